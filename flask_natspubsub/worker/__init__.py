"""The process that runs subscribers."""
