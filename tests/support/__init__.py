"""What the tests stand on: servers, databases, proxies, certificates, waiting."""
