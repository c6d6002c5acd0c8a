"""What a run did: its records, the report, the token microscope, comparisons, and the doctor."""
