"""The built-in passes and criteria; they enter through the same door as a third party's."""

from graphprune.criteria.observed import OBSERVED
from graphprune.criteria.weights import CRITERIA
from graphprune.plugins import Plugin
from graphprune.repair import REPAIRS
from graphprune_passes.align_groups import AlignGroups
from graphprune_passes.clean_up import CleanUp
from graphprune_passes.close_skips import CloseSkips
from graphprune_passes.drop_dead_ends import DropDeadEnds
from graphprune_passes.factorise import Factorise
from graphprune_passes.fold_batch_norm import FoldBatchNorm
from graphprune_passes.fold_masks import FoldMasks
from graphprune_passes.join_weights import JoinWeights
from graphprune_passes.lift_constants import LiftConstants
from graphprune_passes.lower_einsums import LowerEinsums
from graphprune_passes.name_states import NameStates
from graphprune_passes.open_bodies import OpenBodies
from graphprune_passes.open_reads import OpenReads
from graphprune_passes.open_sequences import OpenSequences
from graphprune_passes.open_skips import OpenSkips
from graphprune_passes.part_norms import PartNorms
from graphprune_passes.remove_blocks import RemoveBlocks
from graphprune_passes.remove_channels import RemoveChannels
from graphprune_passes.remove_dead_channels import RemoveDeadChannels
from graphprune_passes.remove_zero_branches import RemoveZeroBranches
from graphprune_passes.reorder_channels import ReorderChannels
from graphprune_passes.separate_fills import SeparateFills
from graphprune_passes.separate_vectors import SeparateVectors
from graphprune_passes.settle_reads import SettleReads
from graphprune_passes.settle_stand_ins import SettleStandIns
from graphprune_passes.share_vectors import ShareVectors
from graphprune_passes.stand_in_experts import StandInExperts
from graphprune_passes.store_statistics import StoreStatistics

plugin = Plugin(
    name="builtin",
    criteria=(*OBSERVED, *CRITERIA),
    passes=(
        DropDeadEnds,
        OpenBodies,
        LiftConstants,
        OpenSequences,
        StoreStatistics,
        JoinWeights,
        LowerEinsums,
        NameStates,
        SeparateFills,
        SeparateVectors,
        AlignGroups,
        OpenSkips,
        OpenReads,
        Factorise,
        RemoveChannels,
        RemoveBlocks,
        CloseSkips,
        ReorderChannels,
        SettleReads,
        StandInExperts,
        SettleStandIns,
        FoldMasks,
        RemoveZeroBranches,
        RemoveDeadChannels,
        CleanUp,
        ShareVectors,
        PartNorms,
        FoldBatchNorm,
    ),
    repairs=REPAIRS,
    prepare=(
        DropDeadEnds(),
        OpenBodies(),
        LiftConstants(),
        OpenSequences(),
        StoreStatistics(),
        JoinWeights(),
        LowerEinsums(),
        OpenSkips(),
        NameStates(),
        SeparateFills(),
        SeparateVectors(),
        AlignGroups(),
    ),
)
