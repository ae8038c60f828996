"""Delta stores: a base's ordered deltas in a folder, and the model at each position.

delta_store    `DeltaStore`: read, append, verify
manifest       what the store's JSON files may say
base_record    what a store says of its base
attachment     live models: attach, checkout, position
loading        a model at a position, from files
exporting      a position as an ordinary checkpoint
deriving       squash, merge, extract, without, diff
sharing        fork, copy, push, pull
hub            the seam to the Hugging Face Hub
model_card     the card of a store on the Hub
"""
