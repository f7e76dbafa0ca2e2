"""`fafa-syncpr`: make a SynCPR of one's own, from seed lists to the annotation file that the training reads.

Each stage reads and writes plain files of one folder (`--out`):

    quadruples  seed lists + chat model        -> quadruples.jsonl       two captions of one person, and the edits
    images      quadruples + text-to-image     -> images.jsonl           one picture per line, cut into two halves
    filter      images + CLIP (+ chat model)   -> scores.jsonl, kept.jsonl
    pack        kept                           -> SynCPR.json

`pairs` and `lora` fine-tune the text-to-image model, so that both halves show one person.
"""
