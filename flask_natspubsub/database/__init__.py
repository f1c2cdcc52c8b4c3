"""The user's database: where its tables are, and what its sessions are about to do."""
