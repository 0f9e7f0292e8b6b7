"""The authors' code, in numbers: every stored array must come out of ours.

The vectors are not part of the repository. They are looked for in the folder named by INFTY_DIFF_PARITY_DIR, by default
`../shared/parity`; the beginning of a file's name says what kind of file it is, its `config` everything else.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import parity_diffusion
import parity_networks
from parity_vectors import Vectors

FOLDER = Path(os.environ.get("INFTY_DIFF_PARITY_DIR") or Path(__file__).parents[1] / ".." / "shared" / "parity")
FILES = sorted(FOLDER.glob("*.npz"))

# The longest prefix that fits decides.
CHECKS = {
    "schedules": parity_diffusion.check_schedules,
    "mollifier": parity_diffusion.check_mollifier,
    "diffusion_losses": parity_diffusion.check_diffusion_losses,
    "diffusion_sampling": parity_diffusion.check_diffusion_sampling,
    "ops": parity_networks.check_ops,
    "sparse_unet": parity_networks.check_sparse_unet,
    "sparse_encoder": parity_networks.check_sparse_encoder,
    "mlp_skip_net": parity_networks.check_mlp_skip_net,
    "train_step": parity_networks.check_train_step,
    "end_to_end": parity_networks.check_end_to_end,
}

# Arrays that record a defect of the authors' code, which ours does not have. Everything else must be compared.
LEFT_OUT = [
    # The torch_dense layout away from its training size: kernel kept, its normaliser resized.
    "*_asis/*",
    # Norms with an epsilon of 1e-3 in every precision but float32.
    "*_eps1e-3",
    *parity_diffusion.LEFT_OUT,
]


MISSING = pytest.param(
    None, marks=pytest.mark.skip(f"no parity vectors in {FOLDER}; set INFTY_DIFF_PARITY_DIR to their folder")
)


@pytest.mark.parametrize("path", FILES or [MISSING], ids=lambda path: path.stem if path else "missing")
def test_parity(path: Path) -> None:
    kinds = [kind for kind in CHECKS if path.stem.startswith(kind)]
    assert kinds, f"{path.name} is of no known kind: {', '.join(CHECKS)}"
    vectors = Vectors(path)
    CHECKS[max(kinds, key=len)](path, vectors, vectors.config)
    unread = vectors.unread(LEFT_OUT)
    assert not unread, f"{len(unread)} arrays were not compared: {unread[:10]}"
