"""
The calibration of an output whose vectors are int8: what a step of them stands for, fixed once for the whole job.

    OUT/_engine/calibration.json    created once, before the first shard is embedded, and never written again

Of several runs that calibrate at once one wins, and all read back what it wrote. Every part says its scale too, and
`vectors.json` holds the parts to it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from engine.commits import Usage
from engine.errors import CorruptOutput
from engine.places import VECTORS
from engine.schema import canonical_json, utc_now

if TYPE_CHECKING:
    from engine.storage import Storage

logger = logging.getLogger(__name__)

CALIBRATION = "_engine/calibration.json"


@dataclass(frozen=True, slots=True)
class Calibration:
    """A scale, and what it was found from."""

    scale: float
    """What a step of int8 stands for."""
    source: str
    """Whose vectors decided: `texts` of the job; a `probe`, a sentence of the engine's, as no text of the sample could be embedded;
    `parts`, which were there without a calibration; or those of an output that they are reused from, `reuse`."""
    num_texts: int = 0
    clipped_share: float = 0.0
    """Of the sample's numbers that lie beyond the steps, and are cut off."""
    lowest_cosine: float | None = None
    """Of the sample's vectors to themselves in int8."""
    usage: Usage | None = None
    """What the sample cost, which no part says."""
    created_at: str = ""


def stored_calibration(storage: Storage) -> Calibration | None:
    """
    Return an output's calibration; None if it has none.

    Raises:
        CorruptOutput: If it cannot be read.
    """
    try:
        fields = json.loads(storage.read(CALIBRATION))
        usage = fields["usage"] and Usage(**fields["usage"])
        return Calibration(**fields | {"usage": usage, "scale": float(fields["scale"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptOutput(
            f"{storage.root}/{CALIBRATION} cannot be read ({type(error).__name__}): delete it. If the output has parts, the next run "
            "takes the scale from them, and if it has none, calibrates again"
        ) from None


def recovered(storage: Storage) -> Calibration | None:
    """Return the calibration that the first commit of an output went by, should its own file be lost; None if there is no commit."""
    try:
        scale = float(json.loads(storage.read(VECTORS))["scale"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    logger.warning("%s/%s is lost: taking the scale of the parts", storage.root, CALIBRATION)
    return Calibration(scale, "parts", created_at=utc_now())


def fix(storage: Storage, calibration: Calibration) -> Calibration:
    """Store a calibration, unless there is one; return the one that holds."""
    storage.create(CALIBRATION, (canonical_json(asdict(calibration)) + "\n").encode())
    return stored_calibration(storage) or calibration
