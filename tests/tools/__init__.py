"""Programs that the Makefile runs: licences, known weaknesses, lowest versions."""
