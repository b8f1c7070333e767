"""Finding and reading raw corpora: every document as it stands in its file, every fault named with its place.

`find_parts` turns the inputs of a source into parts, `read_part` a part into documents. The formats, and the names
by which `format: auto` knows them:

    text        .txt .md .text             one document per file
    jsonl       .jsonl .ndjson .json       one object per line; a .json that is one large value is refused
    parquet     .parquet                   one document per row
    arrow       .arrow                     the streams that `datasets.save_to_disk` writes
    csv         .csv .tsv                  one document per row, below a header
    warc        .warc .wet                 the texts of WET files, the main text of pages
    webdataset  .tar .tgz                  one document per sample
    embedded    -                          the documentation in the Python installation

Those but Parquet and Arrow may be compressed: .gz .bz2 .xz .zst .zstd .lz4 .br. A file without an extension is known by
its first bytes. `format: huggingface` is no format of files: it chooses the data files of a dataset's folder.
"""

from data_prep.readers.find import find_parts
from data_prep.readers.formats import EMBEDDED
from data_prep.readers.read import read_part

__all__ = ["EMBEDDED", "find_parts", "read_part"]
