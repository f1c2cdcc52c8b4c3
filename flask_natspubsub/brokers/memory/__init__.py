"""A broker in the process's memory, with JetStream's semantics and no server."""
