"""NATS JetStream behind the port: one connection, what is published and what is pulled."""
