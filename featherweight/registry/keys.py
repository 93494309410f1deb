"""The key pair that signs what is registered and decided here, and the public keys that are trusted."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from featherweight.errors import GateError, IntegrityError

FOLDER = "FEATHERWEIGHT_KEYS"
PRIVATE, PUBLIC, TRUSTED = "private.pem", "public.pem", "trusted"


@dataclass(frozen=True)
class Keys:
    """A folder of keys: `private.pem` and `public.pem` of one's own, `trusted/*.pem` of others."""

    folder: Path

    @classmethod
    def here(cls) -> Keys:
        """Those of this user: in $FEATHERWEIGHT_KEYS, or in .config/featherweight/keys of the home folder."""
        named = os.environ.get(FOLDER)
        return cls(Path(named) if named else Path.home() / ".config" / "featherweight" / "keys")

    @property
    def private(self) -> Path | None:
        """The private key, None where there is none."""
        return self.folder / PRIVATE if (self.folder / PRIVATE).is_file() else None

    @property
    def public(self) -> list[Path]:
        """All keys that are trusted, one's own first. Raises IntegrityError where that was taken from beside its private one."""
        if self.private and not (self.folder / PUBLIC).is_file():
            way = f"openssl ec -in {self.private} -pubout -out {self.folder / PUBLIC}"
            raise IntegrityError(f"{self.folder / PUBLIC} is missing, without which one's own signatures are not trusted: {way}")
        own = [self.folder / PUBLIC] if (self.folder / PUBLIC).is_file() else []
        return [*own, *sorted((self.folder / TRUSTED).glob("*.pem"))]

    def make(self) -> Path:
        """Make a key pair (ECDSA, P-256) for its owner's eyes; returns the public key. Raises GateError where either is there."""
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if (self.folder / PUBLIC).exists() and not (self.folder / PRIVATE).exists():
            way = f"move it into {self.folder / TRUSTED} first, so that what it vouches for stays trusted"
            raise GateError(f"{self.folder / PUBLIC} is there already, without its private key; {way}")
        key = ec.generate_private_key(ec.SECP256R1())
        plain = serialization.NoEncryption()
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        try:
            (self.folder / PRIVATE).touch(mode=0o600, exist_ok=False)
        except FileExistsError as error:
            raise GateError(f"{self.folder / PRIVATE} is there already; what it signed could not be verified without it") from error
        (self.folder / PRIVATE).write_bytes(private)
        (self.folder / PUBLIC).write_bytes(public)
        return self.folder / PUBLIC

    def sign(self, text: str) -> str:
        """Signature of a text in base64, '' without a private key."""
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        if self.private is None:
            return ""
        try:
            key = load_pem_private_key(self.private.read_bytes(), None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: it wants a password
            raise IntegrityError(f"{self.private} is no readable key without a password: restore it, nothing was signed") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise IntegrityError(f"{self.private} is no key for ECDSA")
        return base64.b64encode(key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))).decode()

    def signed(self, text: str, signature: str) -> bool:
        """Whether one of the trusted keys signed a text."""
        return any(_signed(path, text, signature) for path in self.public)


def _signed(public: Path, text: str, signature: str) -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(public.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise IntegrityError(f"{public} is no readable key: restore it, or remove it and trust it no more") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IntegrityError(f"{public} is no public key for ECDSA")
    try:
        key.verify(base64.b64decode(signature, validate=True), text.encode(), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError):  # no base64 either
        return False
    return True
