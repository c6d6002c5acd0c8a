"""The adaptive temperature inside generation engines, each unmodified; masked-diffusion decoding. One file
each."""
