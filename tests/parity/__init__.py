"""Parity with TRL and verl: their code against ours, on random batches (`make test-parity`)."""
