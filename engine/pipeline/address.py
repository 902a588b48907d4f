"""The address of a Ray to join: where it comes from, and whether anything answers there."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from ray._common.utils import get_ray_address_file
from ray._private import services

from engine.errors import ConfigError

VARIABLE = "RAY_ADDRESS"
CONNECT_S = 5.0
"""For a connection to it. Ray itself tries for ten minutes, in silence, and the run would hold the output meanwhile."""


@dataclass(frozen=True, slots=True)
class Address:
    """As Ray is about to go by it."""

    text: str
    origin: str
    """`--address`, a variable, or a file."""

    @classmethod
    def of(cls, asked: str | None) -> Address | None:
        """
        Return the address that Ray goes by, or None if it starts a Ray here.

        Args:
            asked: `--address`, if it was given.
        """
        origin = "--address"
        if asked in (None, "auto") and (named := os.environ.get(VARIABLE)):
            asked, origin = named, VARIABLE
        if asked in (None, "auto") and (noted := services.find_bootstrap_address(None)):
            asked, origin = noted, get_ray_address_file(None)
        return None if asked in (None, "local") else cls(str(asked), origin)

    def check(self) -> None:
        """
        Make sure that something answers.

        Raises:
            ConfigError: If nothing does, or it is the address of something else than a Ray that can be joined.
        """
        if self.text == "auto":
            return  # Ray looks for the processes of one here
        scheme, separator, _ = self.text.partition("://")
        if separator:  # the rest may hold a password
            raise ConfigError(
                f"{self.origin} is a {scheme}:// address, and a run cannot be driven from outside of its cluster: submit it as a job (ray "
                "job submit), or run it on a node of the cluster. --address takes HOST:PORT, and --address local starts a Ray here"
            )
        try:
            host, port = services.extract_ip_port(services.canonicalize_bootstrap_address(self.text))
        except ValueError:
            raise ConfigError(f"{self.origin}: {self.text!r} is not an address: give HOST:PORT") from None
        try:
            socket.create_connection((host, port), timeout=CONNECT_S).close()
        except OSError as error:
            raise ConfigError(
                f"nothing answers at {self.text} ({error.strerror or type(error).__name__}), the address of a Ray {self._advice()}"
            ) from None

    def _advice(self) -> str:
        if self.origin == "--address":
            return "that --address gives: is a cluster running there? --address local starts one on this machine"
        if self.origin == VARIABLE:
            return f"in {VARIABLE}: is a cluster running there? Unset it, or give --address local, and one is started on this machine"
        return (
            f"that was started by `ray start` and is gone: {self.origin} names it. Delete that file, or give --address local, and one "
            "is started on this machine"
        )
