"""The data sets by name: classes, published files, checksums, and where the files may lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from isthmus.training._fetch import RemoteFile

__all__ = ["SOURCES", "DatasetSource"]


@dataclass(frozen=True)
class DatasetSource:
    """A published data set.

    Attributes:
        name: how it is called here.
        kind: ``"idx"`` (MNIST and its kin) or ``"cifar"``.
        classes: name of each class.
        channels: 1 or 3.
        size: height and width.
        examples: how many there are, per split.
        folders: names of its folder inside a data folder, tried in order.
        remote: per split, the alternatives to download, each a tuple of files needed together.
        plain_md5: checksums of unzipped files, to tell the published files from others.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    channels: int
    size: int
    examples: Mapping[str, int]
    folders: tuple[str, ...]
    remote: Mapping[str, tuple[tuple[RemoteFile, ...], ...]]
    plain_md5: Mapping[str, str] = field(default_factory=dict[str, str])


IDX_PREFIX = {"train": "train", "test": "t10k"}


def _idx_remote(
    mirrors: tuple[str, ...], md5: Mapping[str, str]
) -> dict[str, tuple[tuple[RemoteFile, ...], ...]]:
    return {
        split: (
            tuple(
                RemoteFile(f"{prefix}-{kind}-ubyte.gz", md5[f"{prefix}-{kind}"], mirrors)
                for kind in ("images-idx3", "labels-idx1")
            ),
        )
        for split, prefix in IDX_PREFIX.items()
    }


def _cifar_remote(
    name: str, binary: str, python: str, binary_mirrors: tuple[str, ...] = ()
) -> dict[str, tuple[tuple[RemoteFile, ...], ...]]:
    toronto = "https://www.cs.toronto.edu/~kriz/"
    alternatives = (
        (RemoteFile(f"{name}-binary.tar.gz", binary, (toronto, *binary_mirrors)),),
        (RemoteFile(f"{name}-python.tar.gz", python, (toronto,)),),
    )
    return {"train": alternatives, "test": alternatives}


_FASHION = "T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot"
_CIFAR10 = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck"
_CIFAR100 = (
    "apple,aquarium_fish,baby,bear,beaver,bed,bee,beetle,bicycle,bottle,bowl,boy,bridge,bus,butterfly,camel,"
    "can,castle,caterpillar,cattle,chair,chimpanzee,clock,cloud,cockroach,couch,crab,crocodile,cup,dinosaur,"
    "dolphin,elephant,flatfish,forest,fox,girl,hamster,house,kangaroo,keyboard,lamp,lawn_mower,leopard,lion,"
    "lizard,lobster,man,maple_tree,motorcycle,mountain,mouse,mushroom,oak_tree,orange,orchid,otter,palm_tree,"
    "pear,pickup_truck,pine_tree,plain,plate,poppy,porcupine,possum,rabbit,raccoon,ray,road,rocket,rose,sea,"
    "seal,shark,shrew,skunk,skyscraper,snail,snake,spider,squirrel,streetcar,sunflower,sweet_pepper,table,"
    "tank,telephone,television,tiger,tractor,train,trout,tulip,turtle,wardrobe,whale,willow_tree,wolf,woman,"
    "worm"
)

SOURCES: dict[str, DatasetSource] = {
    source.name: source
    for source in (
        DatasetSource(
            "mnist",
            "idx",
            tuple("0123456789"),
            1,
            28,
            {"train": 60_000, "test": 10_000},
            ("mnist", "MNIST"),
            _idx_remote(
                (
                    "https://ossci-datasets.s3.amazonaws.com/mnist/",
                    "https://storage.googleapis.com/cvdf-datasets/mnist/",
                ),
                {
                    "train-images-idx3": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                    "train-labels-idx1": "d53e105ee54ea40749a09fcbcd1e9432",
                    "t10k-images-idx3": "9fb629c4189551a2d022fa330f9573f3",
                    "t10k-labels-idx1": "ec29112dd5afa0611ce80d1b7f02629c",
                },
            ),
            {
                "train-images-idx3": "6bbc9ace898e44ae57da46a324031adb",
                "train-labels-idx1": "a25bea736e30d166cdddb491f175f624",
                "t10k-images-idx3": "2646ac647ad5339dbf082846283269ea",
                "t10k-labels-idx1": "27ae3e4e09519cfbb04c329615203637",
            },
        ),
        DatasetSource(
            "fashion-mnist",
            "idx",
            tuple(_FASHION.split(",")),
            1,
            28,
            {"train": 60_000, "test": 10_000},
            ("fashion-mnist", "fashion_mnist", "FashionMNIST"),
            _idx_remote(
                (
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                ),
                {
                    "train-images-idx3": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                    "train-labels-idx1": "25c81989df183df01b3e8a0aad5dffbe",
                    "t10k-images-idx3": "bef4ecab320f06d8554ea6380940ec79",
                    "t10k-labels-idx1": "bb300cfdad3c16e7a12a480ee83cd310",
                },
            ),
        ),
        DatasetSource(
            "cifar10",
            "cifar",
            tuple(_CIFAR10.split(",")),
            3,
            32,
            {"train": 50_000, "test": 10_000},
            ("cifar10", "cifar-10", "CIFAR10"),
            _cifar_remote(
                "cifar-10",
                "c32a1d4ab5d03f1284b67883e8d87530",
                "c58f30108f718f92721af3b95e74349a",
                ("https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/",),
            ),
        ),
        DatasetSource(
            "cifar100",
            "cifar",
            tuple(_CIFAR100.split(",")),
            3,
            32,
            {"train": 50_000, "test": 10_000},
            ("cifar100", "cifar-100", "CIFAR100"),
            _cifar_remote(
                "cifar-100", "03b5dce01913d631647c71ecec9e9cb8", "eb9058c3a382ffc7106e4002c42a8d85"
            ),
        ),
    )
}
