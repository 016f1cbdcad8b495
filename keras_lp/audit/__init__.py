"""Audits: what an attacker learns from an update, or from a model, about the data."""

from keras_lp.audit.leakage import LeakageResult, UpdateLeakage, audit_update_leakage
from keras_lp.audit.membership import MembershipLeakage, MembershipResult, audit_membership

__all__ = [
    "LeakageResult",
    "MembershipLeakage",
    "MembershipResult",
    "UpdateLeakage",
    "audit_membership",
    "audit_update_leakage",
]
