"""A broker inside the process: JetStream's semantics without a server."""
