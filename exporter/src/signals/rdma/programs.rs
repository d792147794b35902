// SPDX-License-Identifier: Apache-2.0
//! Where does `rdma` hook on this kernel, and what has its object to know of it?

use std::sync::Arc;

use crate::{
    hook::{Program, Target},
    kernel::{Kernel, btf::Btf, symbols::Symbols},
    probe::Constants,
};

/// What ends a pair, on every kernel. Attached before what begins one: a pair whose end was not seen would keep its number
/// and address.
const DESTROY: &[Program] = &[
    Program::required("destroy", Target::Kprobe(&["ib_destroy_qp_user"])),
    Program::required("destroy_return", Target::Kretprobe(&["ib_destroy_qp_user"])),
];

/// What else every kernel has.
const PROGRAMS: &[Program] = &[
    Program::required("modify_user", Target::Kprobe(&["ib_modify_qp_with_udata"])),
    Program::wanted("modify_kernel", Target::Kprobe(&["ib_modify_qp"])),
    Program::required(
        "modify_return",
        Target::Kretprobe(&["ib_modify_qp_with_udata", "ib_modify_qp"]),
    ),
    Program::wanted("qp_event", Target::Kprobe(&["ib_uverbs_qp_event_handler"])),
    Program::wanted("resolve_addr", Target::Kprobe(&["rdma_resolve_addr"])),
    Program::wanted(
        "resolve_addr_return",
        Target::Kretprobe(&["rdma_resolve_addr"]),
    ),
    Program::wanted("resolve_route", Target::Kprobe(&["rdma_resolve_route"])),
    Program::wanted(
        "resolve_route_return",
        Target::Kretprobe(&["rdma_resolve_route"]),
    ),
    Program::wanted("cm_event", Target::Kprobe(&["cma_cm_event_handler"])),
    Program::wanted("destroy_id", Target::Kprobe(&["rdma_destroy_id"])),
    Program::wanted("register", Target::Kprobe(REGISTER)),
    Program::wanted("register_return", Target::Kretprobe(REGISTER)),
    Program::wanted(
        "pin_user",
        Target::Kprobe(&["ib_umem_get", "ib_umem_odp_get", "ib_umem_get_peer"]),
    ),
    Program::if_there("pin_user_attr", Target::Kprobe(&["ib_umem_get_attr_or_va"])),
    Program::if_there(
        "pin_dmabuf",
        Target::Kprobe(&[
            "ib_umem_dmabuf_get",
            "ib_umem_dmabuf_get_pinned",
            "ib_umem_dmabuf_get_pinned_revocable_and_lock",
        ]),
    ),
    Program::if_there(
        "pin_dmabuf_for",
        Target::Kprobe(&["ib_umem_dmabuf_get_pinned_with_dma_device"]),
    ),
];

const REGISTER: &[&str] = &[
    "ib_uverbs_reg_mr",
    "ib_uverbs_handler_UVERBS_METHOD_REG_MR",
    "ib_uverbs_handler_UVERBS_METHOD_REG_DMABUF_MR",
];

/// A creation by user space, from 5.15 (commit 514aee660df4).
const CREATE: &[Program] = &[
    Program::required("create", Target::Kprobe(&["ib_create_qp_user"])),
    Program::required("create_return", Target::Kretprobe(&["ib_create_qp_user"])),
];

const HANDLERS: &[&str] = &[
    "ib_uverbs_handler_UVERBS_METHOD_QP_CREATE",
    "ib_uverbs_create_qp",
    "ib_uverbs_ex_create_qp",
];

/// What tells a creation by user space before, and the new pair's number where no type does.
const HANDLE: &[Program] = &[
    Program::wanted("create_handler", Target::Kprobe(HANDLERS)),
    Program::wanted("create_handler_return", Target::Kretprobe(HANDLERS)),
];

const SECURITY: &[Program] = &[Program::required(
    "create_security",
    Target::Kprobe(&["ib_create_qp_security"]),
)];

/// Kernels before 5.15 without CONFIG_SECURITY_INFINIBAND have no function of ib_core that every new pair passes, so each
/// provider's own is hooked (drivers/infiniband of 5.10).
const PROVIDERS: &[Program] = &[Program::wanted(
    "create_provider_return",
    Target::Kretprobe(&[
        "mlx5_ib_create_qp",
        "mlx4_ib_create_qp",
        "irdma_create_qp",
        "i40iw_create_qp",
        "bnxt_re_create_qp",
        "qedr_create_qp",
        "efa_create_qp",
        "hns_roce_create_qp",
        "c4iw_create_qp",
        "rvt_create_qp",
        "ocrdma_create_qp",
        "pvrdma_create_qp",
        "usnic_ib_create_qp",
        "mthca_create_qp",
        "siw_create_qp",
        "rxe_create_qp",
    ]),
)];

const COPY_TO: &[Program] = &[Program::wanted(
    "copy_to",
    Target::Kprobe(&["uverbs_copy_to"]),
)];

/// Functions of before 5.8 also had the name `ib_create_qp_user`, with other arguments; this one came with its own.
pub(super) const CREATE_KERNEL: &str = "ib_create_qp_kernel";

/// The modules whose functions are hooked, the providers' included. Without the first there is no RDMA.
pub(super) const MODULES: [&str; 21] = [
    "ib_core",
    "ib_uverbs",
    "ib_uverbs_support",
    "rdma_cm",
    "mlx5_ib",
    "mlx4_ib",
    "irdma",
    "i40iw",
    "bnxt_re",
    "qedr",
    "efa",
    "hns_roce",
    "hns_roce_hw_v2",
    "iw_cxgb4",
    "rdmavt",
    "ocrdma",
    "vmw_pvrdma",
    "usnic_verbs",
    "ib_mthca",
    "siw",
    "rdma_rxe",
];

/// Chooses the programs for this kernel.
pub(super) fn programs(symbols: &Symbols, numbered: bool) -> Vec<Program> {
    let by_user = symbols.has("ib_create_qp_user") && symbols.has(CREATE_KERNEL);
    let mut programs = Vec::from(DESTROY);
    programs.extend(match by_user {
        true => CREATE,
        false if symbols.has("ib_create_qp_security") => SECURITY,
        false => PROVIDERS,
    });
    if !by_user || !numbered {
        programs.extend(HANDLE);
    }
    if !numbered {
        programs.extend(COPY_TO);
    }
    programs.extend(PROGRAMS);
    programs
}

pub(super) fn resolve(constants: &mut Constants<'_>) {
    constants.offset("OFF_PAIR_DEVICE", &[("ib_qp", "device")]);
    constants.offset("OFF_PAIR_NUMBER", &[("ib_qp", "qp_num")]);
    constants.offset("OFF_PAIR_REAL", &[("ib_qp", "real_qp")]);
    constants.offset("OFF_DEVICE_INDEX", &[("ib_device", "index")]);
    constants.offset("OFF_DEVICE_NAME", &[("ib_device", "name")]);
}

/// The types of ib_core, where it carries some.
pub(super) fn types_of_module(kernel: &Kernel) -> Result<Arc<Btf>, String> {
    let base = kernel.btf.as_ref().map_err(Clone::clone)?;
    Btf::module("ib_core", Arc::clone(base)).map_err(|error| error.to_string())
}
