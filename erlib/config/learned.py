"""Sections of a profile about what is learned from texts: corpora, clusters, routers, experts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from erlib.config.choices import REPEATS, Section
from erlib.config.values import Count, LocalPath, PathOrUrl, Repeats, Sha256, Users


class CorpusSettings(Section):
    name: Literal["newsgroups", "brown", "c4", "jsonl", "parquet"] = Field(
        "newsgroups",
        description="20 Newsgroups, the Brown corpus, one shard of C4 from the hub, or a file of your own: corpus.path",
    )
    path: LocalPath | None = Field(
        None, description="file of a jsonl or parquet corpus; a relative path starts at the repository, ~ is your home"
    )
    text_field: str = Field("text", min_length=1, description="field or column of that file with the text")
    label_field: str | None = Field(None, min_length=1, description="field or column with the topic (none: no labels)")
    documents: PositiveInt | None = Field(None, le=10**9, description="how many documents to take (none: all)")
    holdout: float = Field(0.4, gt=0, lt=1, description="share held out where the corpus has no test split")

    @model_validator(mode="after")
    def _says_what_to_read(self) -> CorpusSettings:
        is_file = self.name in ("jsonl", "parquet")
        if is_file and self.path is None:
            raise ValueError(f"corpus.name={self.name} needs corpus.path")
        if self.path is not None and not is_file:
            raise ValueError(f"corpus.name={self.name} reads no corpus.path; set corpus.name=jsonl or parquet")
        if self.name == "c4" and self.documents is None:
            raise ValueError("C4 has 365 million documents: set corpus.documents (c-BTM fitted on one shard, 356317)")
        return self


class ClustererSettings(Section):
    n_clusters: int = Field(8, ge=2, le=1000, description="clusters, and experts")
    n_components: int = Field(100, ge=2, le=10_000, description="dimensions that SVD leaves of TF-IDF")
    normalizer: Literal["l2", "standard"] = Field(
        "l2", description="l2: each vector, as c-BTM's code does; standard: each dimension, as the papers say"
    )
    stop_words: Literal["sklearn", "nltk"] = Field("sklearn", description="whose list of English stop words")
    pickles: PathOrUrl | None = Field(None, description="directory or URL prefix of c-BTM's tfidf.pkl and kmeans.pkl")
    pickles_sha256: tuple[Sha256, Sha256] | None = Field(None, description="sha256 of tfidf.pkl and kmeans.pkl")


class RouterSettings(Section):
    """Other routers beside the clusterer; an embedding takes a tenth of a second."""

    examples: Count = Field(800, description="training documents that sentence embeddings are fitted to")
    documents: Count = Field(400, description="held-out documents, the same for all routers")
    prompts: Count = Field(100, description="prompts per length whose classification is timed")


class ExpertSettings(Section):
    """One trained expert per cluster of a corpus of its own, and what routing to them is worth."""

    corpus: CorpusSettings = CorpusSettings(name="brown")
    checkpoint: LocalPath | None = Field(
        None, description="a Llama checkpoint to start from, in Hugging Face's format (none: SmolLM2-135M)"
    )
    adapters: LocalPath | None = Field(
        None, description="a folder of your own with expert-0 and so on, in PEFT's format, to be served (none: trained)"
    )
    router: Literal["classify", "embeddings", "neighbours", "topics"] = Field(
        "classify",
        description="whose clusters the experts are of. classify: c-BTM's; embeddings: those of sentence embeddings; "
        "neighbours: a vote of labelled examples; topics: the labels, which no prompt has",
    )
    tokens: Count = Field(4096, description="that each expert is trained on, all of its own cluster")
    seed_tokens: int = Field(
        8192, ge=0, le=1_000_000_000, description="of all clusters, that the common seed is trained on before"
    )
    random: int = Field(2, ge=2, le=100, description="experts of random clusters, trained on as many tokens")
    sequence: int = Field(256, ge=16, le=8192, description="tokens of a block to train on, and most of a judged text")
    batch: Count = Field(1, description="blocks per step")
    rank: int = Field(8, ge=1, le=512, description="of the low-rank adapters (LoRA), at all layers")
    layers: Count | None = Field(None, description="the checkpoint's first so many layers alone, to try (none: all)")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="of AdamW, at its highest")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights and activations; auto: bfloat16 where the hardware multiplies it"
    )
    users: list[Users] = Field([], description="concurrent users whom trained experts serve (none: not served)")
    repeats: Repeats = Field(2, description=REPEATS)
    documents: Count = Field(8, description="held-out texts per cluster that the experts are judged by")
    answer_tokens: int = Field(
        0, ge=0, le=128, description="of answers that an independent language model judges (0: none are asked for)"
    )
    temperature: float = Field(
        0.1, gt=0, le=1000, description="of an ensemble's weights, from squared distances to the clusters, as c-BTM's"
    )

    @model_validator(mode="after")
    def _serves_what_it_can(self) -> ExpertSettings:
        if self.users and self.router != "classify" and not self.adapters:
            raise ValueError(
                f"experts of router={self.router} can be judged, not served: gateways route them by c-BTM's clusters; "
                "set experts.users=[]"
            )
        if self.users and (self.checkpoint or self.layers):
            what = "a checkpoint of your own" if self.checkpoint else "some layers alone"
            raise ValueError(f"experts of {what} can be trained and judged, not served: set experts.users=[]")
        return self
