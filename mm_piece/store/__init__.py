"""Delta stores: a base's ordered deltas in a folder, and the model at each position.

delta_store    `DeltaStore`: read, append, verify
folder         names of what lies in a store's folder
lock           one writer at a time
records        the base and the deltas, as the manifest records them
results        the accuracy matrix and what goes with it
board          scores and losses as TensorBoard shows them
manifest       the store's JSON files: read, written, validated
fields         what each of their fields may hold
inspection     stores and delta files: describe, compare
copying        fork and copy, from folder to folder (snapshot)
garbage        what may go from a store's folder
base_location  where the base lies
base_reading   its dtype, and which of its files are read
base_record    the store's record of its base
attachment     live models: attach, checkout, position
loading        a model at a position, from files
exporting      a position as an ordinary checkpoint
squashing      a position as one delta
deriving       merge, extract, remove a task
conversion     deltas to and from formats of other programs
sharing        push, pull
hub            the seam to the Hugging Face Hub
model_card     the card of a store on the Hub
"""
