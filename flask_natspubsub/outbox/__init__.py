"""The table of events to send: written with the caller's rows, sent by the relay."""
