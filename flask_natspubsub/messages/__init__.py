"""The content of messages: subjects, ids, JSON and the envelope. No I/O, no Flask, no NATS."""
