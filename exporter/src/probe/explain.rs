// SPDX-License-Identifier: Apache-2.0
//! Why was something refused, and what is to be done?

use std::{error::Error, fmt, io};

use aya::{EbpfError, programs::ProgramError};

use crate::{hook::Reason, kernel::Kernel};

/// What to do where tracepoints cannot be found.
pub const NO_TRACEFS: &str =
    "tracefs is not to be seen: mount it at /sys/kernel/tracing (in a container, from the host)";

pub(super) fn reason_of_object(error: &EbpfError) -> Reason {
    cause(error).map_or(Reason::Failed, reason_of_errno)
}

pub(super) fn reason_of(error: &ProgramError) -> Reason {
    match error {
        ProgramError::Btf(_) => Reason::NoHook,
        // The verifier's own refusals are EACCES, EINVAL or E2BIG; what the process may not do is EPERM.
        ProgramError::LoadError { io_error, .. } => match reason_of_errno(io_error) {
            Reason::Failed => Reason::Rejected,
            Reason::NoPermission if is_verifier(io_error) => Reason::Rejected,
            reason => reason,
        },
        other => cause(other).map_or(Reason::Failed, reason_of_errno),
    }
}

pub(super) fn is_verifier(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::ACCESS.raw_os_error())
}

/// Says if a kprobe was refused since several functions have its name.
fn is_ambiguous(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrNotAvailable
}

/// Says if perf_event_open(2) failed, by which kprobes are attached.
pub(super) fn is_refused_probe(error: &(dyn Error + 'static)) -> bool {
    let error = error.downcast_ref::<ProgramError>();
    matches!(error, Some(ProgramError::SyscallError(error)) if error.call == "perf_event_open")
}

pub(super) fn reason_of_errno(error: &io::Error) -> Reason {
    match error.kind() {
        io::ErrorKind::PermissionDenied => Reason::NoPermission,
        io::ErrorKind::OutOfMemory => Reason::NoMemory,
        // The second: there are several functions of the name.
        io::ErrorKind::NotFound | io::ErrorKind::AddrNotAvailable => Reason::NoHook,
        _ => Reason::Failed,
    }
}

/// The I/O error at the bottom of an error's chain.
pub(super) fn cause<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a io::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        next = error.source();
    }
    None
}

/// What was tried, why it failed, what to do, in one line.
pub(super) fn explain(what: &str, error: &(dyn Error + 'static), kernel: &Kernel) -> String {
    let mut why = Chain(error)
        .to_string()
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    if why.len() > 400 {
        // A verifier log ends with what it refused.
        let tail = why.char_indices().rev().nth(299).map_or(0, |(at, _)| at);
        why = format!("… {}", &why[tail..]);
    }
    let cause = cause(error);
    let hint = match cause.map(reason_of_errno) {
        Some(Reason::NoPermission) if is_refused_probe(error) => kernel.probe_hint(),
        Some(Reason::NoPermission) if cause.is_some_and(is_verifier) => String::new(),
        Some(Reason::NoPermission) => kernel.permission_hint(),
        Some(Reason::NoHook) if cause.is_some_and(is_ambiguous) => {
            "; this kernel refuses a function of which it has several, as with a live patch that has its name".to_owned()
        }
        Some(Reason::NoMemory) => "; raise LimitMEMLOCK or the container's memory limit".to_owned(),
        _ => String::new(),
    };
    format!("cannot {what}: {why}{hint}")
}

pub(super) struct Chain<'a>(pub(super) &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = self.0.to_string();
        f.write_str(&last)?;
        let mut next = self.0.source();
        while let Some(error) = next {
            let text = error.to_string();
            // aya repeats the source in some messages.
            if !last.contains(&text) {
                write!(f, ": {text}")?;
            }
            last = text;
            next = error.source();
        }
        Ok(())
    }
}
