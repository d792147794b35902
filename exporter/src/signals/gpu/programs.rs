// SPDX-License-Identifier: Apache-2.0
//! Where does `gpu` hook, and what has its object to know of the kernel?

use crate::{
    hook::{Program, Target},
    probe::Constants,
};

const TASK: &[&str] = &[
    "OFF_TASK_TGID",
    "OFF_TASK_PID",
    "OFF_TASK_SIGNAL",
    "OFF_SIGNAL_LIVE",
];

pub(super) const PROGRAMS: &[Program] = &[
    Program::required("sched_process_exit", Target::TpBtf).needing(TASK),
    Program::wanted("sched_process_fork", Target::TpBtf).needing(&["OFF_TASK_TGID"]),
    Program::required("open_files", Target::Iter("task_file")).needing(&[
        "OFF_TASK_TGID",
        "OFF_FILE_INODE",
        "OFF_INODE_MODE",
        "OFF_INODE_RDEV",
    ]),
    Program::wanted("device_open", Target::Kprobe(&["chrdev_open"])).needing(&["OFF_INODE_RDEV"]),
    Program::required("sched_switch", Target::TpBtf).needing(&[
        "OFF_TASK_TGID",
        "OFF_TASK_PID",
        "OFF_TASK_FLAGS",
        "OFF_QUEUED",
        "OFF_RUN_DELAY",
        "OFF_ARRIVALS",
        "OFF_TASK_CFS_RQ",
        "OFF_CFS_RQ_RQ",
        "OFF_RQ_CLOCK",
    ]),
];

pub(super) fn resolve(constants: &mut Constants<'_>) {
    for (constant, name, member) in [
        ("OFF_TASK_TGID", "task_struct", "tgid"),
        ("OFF_TASK_PID", "task_struct", "pid"),
        ("OFF_TASK_FLAGS", "task_struct", "flags"),
        ("OFF_TASK_SIGNAL", "task_struct", "signal"),
        ("OFF_SIGNAL_LIVE", "signal_struct", "live.counter"),
        ("OFF_QUEUED", "task_struct", "sched_info.last_queued"),
        ("OFF_RUN_DELAY", "task_struct", "sched_info.run_delay"),
        ("OFF_ARRIVALS", "task_struct", "sched_info.pcount"),
        ("OFF_TASK_CFS_RQ", "task_struct", "se.cfs_rq"),
        ("OFF_CFS_RQ_RQ", "cfs_rq", "rq"),
        ("OFF_RQ_CLOCK", "rq", "clock"),
        ("OFF_FILE_INODE", "file", "f_inode"),
        ("OFF_INODE_MODE", "inode", "i_mode"),
        ("OFF_INODE_RDEV", "inode", "i_rdev"),
    ] {
        constants.offset(constant, &[(name, member)]);
    }
    constants.task_cgroup();
}
