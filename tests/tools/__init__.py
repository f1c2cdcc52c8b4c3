"""Programs about the project: licences, vulnerabilities, lowest versions, repeated test runs."""
