"""What to do about a TLS handshake that failed."""

from __future__ import annotations

#: What OpenSSL says, in part, and what to do about it.
_ADVICE = (
    ("issuer", "Set NATSPUBSUB_TLS_CA_FILE to the authority that signed the server's certificate"),
    ("self-signed", "Set NATSPUBSUB_TLS_CA_FILE to the authority that the server's belongs to"),
    ("mismatch", "Use the host that the certificate names, or set NATSPUBSUB_TLS_HOSTNAME to it"),
    ("expired", "It is the server's: renew it"),
    ("not yet valid", "Look at the clocks of this machine and of the one that made it"),
    ("alert", "Set NATSPUBSUB_TLS_CERT_FILE and _TLS_KEY_FILE to a certificate the server accepts"),
)


def tls_problem(problem: str) -> str:
    """Say what OpenSSL says, and what to do about it."""
    return next(
        (f"TLS failed, {problem}. {advice}" for words, advice in _ADVICE if words in problem),
        f"TLS failed, {problem}",
    )
