"""The policy: one frozen base, named adapters on it, packed attention, and log-probabilities in chunks."""
