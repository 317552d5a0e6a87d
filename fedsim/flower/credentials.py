"""What a federation proves itself with: a certificate of its server, and a key pair of every node.

An authority signs the server's certificate, and what it signed with is thrown away, so that nobody can sign another in
its name. Servers know nodes by their public keys.
"""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fedsim.config import ConfigError

PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()
AUTHORITY = "fedsim federation"
LOCAL = ("localhost", "127.0.0.1")
DAYS = 365


def write_credentials(folder: Path, num_nodes: int, hosts: Sequence[str] = ()) -> None:
    """Write what is missing of ca.crt, server.pem, server.key, and node<i>.key and node<i>.pub for every node.

    Args:
        folder: where; private keys there are for their owner's eyes alone.
        num_nodes: how many key pairs.
        hosts: names and addresses of the server, besides those of this machine itself.

    Raises:
        ConfigError: if the certificate that is there has expired, or does not name one of the hosts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "server.pem").exists():
        _check_certificate(folder / "server.pem", hosts)
    else:
        _write_certificate(folder, (*LOCAL, *hosts))
    for i in range(num_nodes):
        if not (folder / f"node{i}.pub").exists():
            _write_node(folder, f"node{i}")


def _write_certificate(folder: Path, hosts: Sequence[str]) -> None:
    ca, server = _rsa(), _rsa()
    root = _certificate(AUTHORITY, ca, ca, x509.BasicConstraints(ca=True, path_length=None))
    leaf = _certificate(hosts[-1], server, ca, x509.SubjectAlternativeName(list(map(_host, hosts))))
    (folder / "ca.crt").write_bytes(root.public_bytes(PEM))
    _write_secret(folder / "server.key", server, serialization.PrivateFormat.TraditionalOpenSSL)
    (folder / "server.pem").write_bytes(leaf.public_bytes(PEM))


def _check_certificate(path: Path, hosts: Sequence[str]) -> None:
    found = x509.load_pem_x509_certificate(path.read_bytes())
    known = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    missing = [host for host in hosts if _host(host) not in known]
    expired = found.not_valid_after_utc < datetime.datetime.now(datetime.UTC)
    if missing or expired:
        what = f"does not name {', '.join(missing)}" if missing else f"expired on {found.not_valid_after_utc:%Y-%m-%d}"
        raise ConfigError(f"{path} {what}; remove it to have a new one, and give devices the new ca.crt")


def _write_node(folder: Path, name: str) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    _write_secret(folder / f"{name}.key", key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


def _write_secret(
    path: Path, key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat
) -> None:
    path.touch(mode=0o600)
    path.write_bytes(key.private_bytes(PEM, form, PLAIN))


def _rsa() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def _certificate(
    subject: str, key: rsa.RSAPrivateKey, authority: rsa.RSAPrivateKey, extension: x509.ExtensionType
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(_name(subject)).issuer_name(_name(AUTHORITY))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))
    builder = builder.not_valid_after(now + datetime.timedelta(days=DAYS))
    critical = isinstance(extension, x509.BasicConstraints)
    return builder.add_extension(extension, critical=critical).sign(authority, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    """A name or an address, as certificates have it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
