"""Makes what routers by sentence embedding need: the model as an OpenVINO file, examples with their experts."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from erlib import cache, paths, provenance
from erlib.machine.progress import say
from erlib.routing import embeddings, training
from erlib.routing.clusterer import RouterError
from erlib.routing.embeddings import EXAMPLES, NO_EXPERT, WHEEL, Embedder, experts_of_topics, made_with
from erlib.workload import corpus

if TYPE_CHECKING:
    from erlib import config


def build(profile: config.Profile) -> Path:
    """Export the embedding model, embed training documents, and fit centres, unless all that is in the cache.

    The centres come from the same balanced k-means as c-BTM's, so that the two routers differ in what they make of a
    text and in nothing else. Labelled examples belong to experts by :func:`experts_of_topics`.

    Parameters
    ----------
    profile : Profile
        Gives the corpus, the number of clusters and the seed, which draws ``routers.examples`` documents to embed.

    Returns
    -------
    Path
        Directory for ``embeddings`` and ``neighbours``.

    Raises
    ------
    RouterError
        If the wheel is not installed, the export fails, or there are fewer documents than clusters.
    CorpusError
    """
    model = embeddings.installed_model()
    train = corpus.load_corpus(profile.corpus, profile.seed, "train")
    n_experts, examples = profile.clusterer.n_clusters, profile.routers.examples
    versions = [importlib.metadata.version(name) for name in ("optimum-intel", "openvino")]
    files = ("embedding_export", "embeddings", "training", "clusterer")
    code = provenance.code_digest(*(f"routing/{name}.py" for name in files))
    digest = cache.digest(code, WHEEL, versions, train.sha, n_experts, examples, profile.seed)
    directory = paths.CACHE / "routers" / digest
    what = "sentence embeddings"
    if cache.found(directory, what) and cache.recalled(directory, made_with, what) is not None:
        say(f"sentence embeddings: reused {digest} ({train.name}, same settings and code)")
        return directory
    chosen = np.random.default_rng(profile.seed).permutation(len(train.texts))[:examples]
    if len(chosen) < n_experts:
        raise RouterError(f"{len(chosen)} documents are too few for {n_experts} clusters; take more documents")
    print(f"sentence embeddings: making {digest} from {len(chosen)} documents of {train.name} (none like it yet)")
    with cache.building(directory) as partial:
        _export(model, partial)
        embed = Embedder(partial)
        vectors = embed.many([train.texts[i] for i in chosen])
        centres, _ = training.balanced_kmeans(vectors, n_experts, profile.seed)
        made = {"examples": vectors, "centres": centres}
        if train.labels is not None:
            labels = np.array(train.labels)[chosen]
            made["experts"] = np.where(labels >= 0, experts_of_topics(train.labels, n_experts)[labels], NO_EXPERT)
        np.savez(partial / EXAMPLES, allow_pickle=False, **made)
        shutil.rmtree(directory, ignore_errors=True)  # where one was that cannot be read
    return directory


def _export(model: Path, directory: Path) -> None:
    """In a process of its own, which leaves no PyTorch behind."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(model)]
    command += ["--task", "feature-extraction", "--library", "transformers", "--weight-format", "fp32", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RouterError(f"the export of {WHEEL} to OpenVINO failed: {done.stderr.strip()[-500:]}")
