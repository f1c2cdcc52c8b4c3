"""The worker as processes: parent and children, signals, liveness, reloading."""
