"""Data: records from anywhere, tokenizers that leak nothing, fixed-length examples, planted PII."""

from dpjax.data.bundled import Images, chitchat, load_digits, load_fashion_mnist, shakespeare
from dpjax.data.corpora import Record, dataset_from_records, records_from
from dpjax.data.dataset import NO_USER, ArrayDataset, Dataset, stable_id
from dpjax.data.hub_tokenizers import hub_tokenizer, pretrained_tokenizer
from dpjax.data.pii import PlantedPII, PlantedSecret, load_planted_pii, plant_pii
from dpjax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

__all__ = [
    "NO_USER",
    "ArrayDataset",
    "Dataset",
    "Images",
    "PlantedPII",
    "PlantedSecret",
    "Record",
    "Tokenizer",
    "byte_tokenizer",
    "chitchat",
    "dataset_from_records",
    "hub_tokenizer",
    "load_digits",
    "load_fashion_mnist",
    "load_planted_pii",
    "load_tokenizer",
    "plant_pii",
    "pretrained_tokenizer",
    "records_from",
    "shakespeare",
    "stable_id",
    "train_bpe",
]
