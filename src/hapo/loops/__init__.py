"""Complete, readable loops for what no engine runs: agents with a soft-Q critic (`hapo.loops.etpo`)."""
