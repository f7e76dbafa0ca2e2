"""All layouts, in the order in which they are written."""

from tbps_world.synth.layouts.base import Layout
from tbps_world.synth.layouts.chatpedes import CHATPEDES_LAYOUT
from tbps_world.synth.layouts.diverse import DIVERSE_LAYOUT
from tbps_world.synth.layouts.outfits import ITCPR_LAYOUT, SYNCPR_LAYOUT
from tbps_world.synth.layouts.pedes import CUHK_LAYOUT, FINETUNE_LAYOUT, ICFG_LAYOUT, RSTP_LAYOUT
from tbps_world.synth.layouts.regions import MALS_LAYOUT, SDA_LAYOUT

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        CUHK_LAYOUT,
        ICFG_LAYOUT,
        RSTP_LAYOUT,
        FINETUNE_LAYOUT,
        SDA_LAYOUT,
        SYNCPR_LAYOUT,
        ITCPR_LAYOUT,
        CHATPEDES_LAYOUT,
        MALS_LAYOUT,
        DIVERSE_LAYOUT,
    )
}
