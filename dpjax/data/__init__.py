"""Data: records from anywhere, tokenizers that leak nothing, fixed-length examples, planted PII."""

from dpjax.data.bundled import Images, chitchat, load_digits, load_fashion_mnist, shakespeare
from dpjax.data.corpora import Record, records_from
from dpjax.data.dataset import NO_USER, ArrayDataset, Dataset, stable_id
from dpjax.data.domains import (
    DOMAINS,
    DomainRecord,
    Span,
    domain_records,
    label_phrases,
    read_domain_records,
    write_domain_records,
)
from dpjax.data.domains import LABELS as DOMAIN_LABELS
from dpjax.data.examples import dataset_from_records
from dpjax.data.hub_tokenizers import hub_tokenizer, pretrained_tokenizer
from dpjax.data.pii import PlantedPII, PlantedSecret, load_planted_pii, plant_pii
from dpjax.data.recognisers import RECOGNISED_KINDS, recognise_pii
from dpjax.data.tokenizers import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from dpjax.data.users import UserDataset, by_user

__all__ = [
    "DOMAINS",
    "DOMAIN_LABELS",
    "NO_USER",
    "RECOGNISED_KINDS",
    "ArrayDataset",
    "Dataset",
    "DomainRecord",
    "Images",
    "PlantedPII",
    "PlantedSecret",
    "Record",
    "Span",
    "Tokenizer",
    "UserDataset",
    "by_user",
    "byte_tokenizer",
    "chitchat",
    "dataset_from_records",
    "domain_records",
    "hub_tokenizer",
    "label_phrases",
    "load_digits",
    "load_fashion_mnist",
    "load_planted_pii",
    "load_tokenizer",
    "plant_pii",
    "pretrained_tokenizer",
    "read_domain_records",
    "recognise_pii",
    "records_from",
    "shakespeare",
    "stable_id",
    "train_bpe",
    "write_domain_records",
]
