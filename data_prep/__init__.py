"""From text files to tokenised, packed, checked shards. One call: `data_prep.prepare.prepare`."""
