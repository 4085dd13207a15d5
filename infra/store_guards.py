"""Create the keys of a local SeaweedFS: only its own parts and S3 clients with a key get access.

SeaweedFS consists of several servers, and by default only the S3 server requires a key.
docs/guides/security.md lists its ports and how each is protected.
"""

import json
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

PARTS = ("master", "volume", "filer", "s3", "admin", "worker", "client")
TOKENS = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
# The store is for development and never runs longer. Each start creates a new certificate.
VALID_DAYS = 3650


def write_guards(folder: Path) -> None:
    """Write `security.toml`, which SeaweedFS reads from its working folder, and its certificate.

    Its servers then accept gRPC only from holders of the certificate's key, and serve stored bytes
    over HTTP only with a token that they sign for each other.
    """
    certificate, key = _make_certificate()
    _write_private(folder / "s3-cert.pem", certificate)
    _write_private(folder / "s3-key.pem", key)
    # A JSON string is also a valid TOML string.
    cert_path, key_path = (json.dumps(str(folder / f"s3-{name}.pem")) for name in ("cert", "key"))
    lines = [f"[grpc]\nca = {cert_path}"]
    lines += [f"[grpc.{part}]\ncert = {cert_path}\nkey = {key_path}" for part in PARTS]
    lines += [f'[{token}]\nkey = "{secrets.token_hex(32)}"' for token in TOKENS]
    _write_private(folder / "security.toml", ("\n".join(lines) + "\n").encode())


def _make_certificate() -> tuple[bytes, bytes]:
    """Create a self-signed certificate and its private key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mae object store")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks may be changed in the meantime
        .not_valid_after(now + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _write_private(file: Path, content: bytes) -> None:
    file.touch(mode=0o600)
    file.chmod(0o600)
    file.write_bytes(content)
