"""Environment of the tests and of every child process they start."""

import os

from beyond_dpo import paths

os.environ.update(
    PYTHONPATH=os.pathsep.join(filter(None, [str(paths.ROOT / "lib"), os.environ.get("PYTHONPATH")])),
    TOKENIZERS_PARALLELISM="false",  # forked children of a used tokenizer warn and may hang
    HF_HUB_OFFLINE="1",  # no test needs the network
    TQDM_DISABLE="1",
    MPLBACKEND="agg",
)
for name in ("COMPUTE", "NB", "PROFILE", "MAKEFLAGS", "MAKELEVEL"):
    os.environ.pop(name, None)  # what the caller (or make) set for itself is not part of a test
