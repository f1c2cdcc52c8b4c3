"""What is said: subjects, ids, JSON and the envelope. No I/O, no Flask, no NATS."""
