"""A profile's clusterer: the one in the cache, or fitted, or made of c-BTM's pickles."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType

from erlib import cache, config, paths, provenance
from erlib.machine.progress import say
from erlib.routing import pickles
from erlib.routing.clusterer import Clusterer, ClustererError
from erlib.workload import corpus


def build_clusterer(profile: config.Profile) -> Path:
    """Fit or convert the profile's clusterer, unless the same one is in the cache.

    Returns
    -------
    Path
        Directory for :meth:`Clusterer.load`; its name is the content hash of corpus, settings, seed and code.

    Raises
    ------
    ClustererError, corpus.CorpusError
    """
    settings = profile.clusterer
    modules = ["building", "training", "clusterer", *(["pickles"] if settings.pickles else [])]
    code = provenance.code_digest(*(f"routing/{module}.py" for module in modules))
    if settings.pickles:
        source = settings.pickles
        local = [path for name in pickles.FILES if (path := Path(source) / name).is_file()]
        digest = cache.digest(code, settings.model_dump(mode="json"), *local)
        train = None
    else:
        train = corpus.load_corpus(profile.corpus, profile.seed, "train")
        source = f"{len(train.texts)} documents of {train.name}"
        # NLTK's list is downloaded, whatever version there is.
        words = _training().stop_words_of("nltk") if settings.stop_words == "nltk" else []
        digest = cache.digest(*code, train.sha, settings.model_dump(mode="json"), profile.seed, *words)
    directory = paths.CACHE / "clusterers" / digest
    if cache.found(directory, "clusterer") and (kept := cache.recalled(directory, Clusterer.load, "clusterer")):
        say(f"clusterer: reused {digest} ({source}, same settings and code)")
        _warn(kept)
        return directory
    print(f"clusterer: making {digest} from {source} (none with these settings, code and seed yet)")
    if train is None:
        model = _training().from_pickles(source, settings.pickles_sha256)
        if model.n_clusters != settings.n_clusters:
            raise ClustererError(f"{source} has {model.n_clusters} clusters; set clusterer.n_clusters to that")
    else:
        options = settings.model_dump(exclude={"pickles", "pickles_sha256"})
        model = _training().fit(train.texts, seed=profile.seed, **options)
    with cache.building(directory) as partial:
        model.save(partial)
        shutil.rmtree(directory, ignore_errors=True)  # where one was that cannot be read
    _warn(model)
    return directory


def _warn(model: Clusterer) -> None:
    """Say so if the training documents did not tell the clusters apart, as when all of them are alike."""
    unused = model.facts.get("nearest_sizes", []).count(0)
    if unused:
        print(
            f"clusterer: warning: {unused} of {model.n_clusters} clusters are nearest to no training document: their "
            "experts will hardly be asked: take documents that differ more, or fewer clusters"
        )


def _training() -> ModuleType:
    from erlib.routing import training  # noqa: PLC0415  (torch, scikit-learn and NLTK take four seconds to import)

    return training
