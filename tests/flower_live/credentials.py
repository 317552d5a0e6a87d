"""Certificates and keys that are good for an hour on this machine."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def write_certificates(folder: Path) -> None:
    """ca.crt, and server.pem with server.key, signed by it for localhost and 127.0.0.1."""
    ca, server = _rsa(), _rsa()
    authority = x509.BasicConstraints(ca=True, path_length=None)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    root = _certificate("fedsim test authority", ca, "fedsim test authority", ca, authority)
    leaf = _certificate("localhost", server, "fedsim test authority", ca, names)
    (folder / "ca.crt").write_bytes(root.public_bytes(PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(PEM))
    key = server.private_bytes(PEM, serialization.PrivateFormat.TraditionalOpenSSL, PLAIN)
    (folder / "server.key").write_bytes(key)


def write_node_key(folder: Path, name: str) -> None:
    """A node's private key, and its public one beside it as name.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / name).write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)


def _rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _certificate(
    subject: str, key: rsa.RSAPrivateKey, issuer: str, issuer_key: rsa.RSAPrivateKey, extension: x509.ExtensionType
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(_name(issuer))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))
    builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
    critical = isinstance(extension, x509.BasicConstraints)
    return builder.add_extension(extension, critical=critical).sign(issuer_key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
