"""Pure functions on tensors, one stage a file. No trainer, configuration object or global enters here."""
