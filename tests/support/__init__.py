"""Code that tests share: servers, databases, processes, proxies, certificates, waiting."""
