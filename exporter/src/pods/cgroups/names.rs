// SPDX-License-Identifier: Apache-2.0
//! What is a cgroup called on a host without Kubernetes?
//!
//! Two cgroups of different owners have different names; in what is one's own one may give several one name (by directories that systemd
//! would not make), and all of a Slurm step has one. A name is the path without what says nothing: slices above a
//! unit (systemd has one unit of a name, whatever its slice), the directories inside of a Slurm step, LXC's `ns`. Where another systemd
//! begins (in a user's session, in a container) a colon says so: `user@1000.service:app.service`, `lxc/101:nginx.service`.

/// Longest name, in bytes. Whoever may make cgroups can make paths of 4 KiB: a longer name ends with a number made of all of it.
const LONGEST: usize = 240;

/// How the names of systemd's units end that have processes.
const UNITS: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];

/// Directories in which a manager without systemd has one for each container.
const MANAGERS: [&str; 7] = [
    "default",
    "docker",
    "k8s.io",
    "libpod_parent",
    "lxc",
    "machine",
    "moby",
];

/// Names a cgroup by its path below the root of the hierarchy.
pub(super) fn name(path: &str) -> String {
    let parts = parts(path);
    let name = step(&parts).unwrap_or_else(|| joined(&parts));
    cut(or_root(name))
}

/// What a cgroup is nested in, and so charged to: a Slurm step, or the outermost unit or container.
pub(super) fn outer(path: &str) -> String {
    let parts = parts(path);
    let Some(at) = parts.iter().position(|part| !is_slice(part)) else {
        return or_root(joined(&parts));
    };
    let end = at + 1 + usize::from(MANAGERS.contains(&parts[at]));
    let step = step(&parts).filter(|_| is_slurm(parts[at]));
    cut(step.unwrap_or_else(|| joined(&parts[..end.min(parts.len())])))
}

fn parts(path: &str) -> Vec<&str> {
    path.split('/').filter(|part| !part.is_empty()).collect()
}

fn or_root(name: String) -> String {
    match name.is_empty() {
        true => "/".to_owned(),
        false => name,
    }
}

fn is_slice(part: &str) -> bool {
    part.ends_with(".slice")
}

fn is_unit(part: &str) -> bool {
    UNITS.iter().any(|end| part.ends_with(end))
}

/// Says if a directory is that of Slurm's step daemons: `slurmstepd.scope`, with the node's name before it where Slurm was built for
/// several nodes on a host.
fn is_slurm(part: &str) -> bool {
    let node = part.strip_suffix("slurmstepd.scope");
    node.is_some_and(|node| node.is_empty() || node.ends_with('_'))
}

/// The name of the Slurm step that a cgroup is in: its job and itself. A job is `job_12`, from 26.05 on an opaque id.
fn step(parts: &[&str]) -> Option<String> {
    let at = parts.iter().position(|part| is_slurm(part))?;
    let name = match &parts[at + 1..] {
        [job, step, ..] if step.starts_with("step_") => format!("{job}/{step}"),
        [job, ..] if job.starts_with("job_") => (*job).to_owned(),
        _ => return None,
    };
    Some(match parts[..at].iter().rposition(|part| !is_slice(part)) {
        // In a container.
        Some(last) => format!("{}:{name}", joined(&parts[..=last])),
        None => name,
    })
}

/// The directories, without those that say nothing.
fn joined(parts: &[&str]) -> String {
    let mut name = String::new();
    let mut slices: Vec<&str> = Vec::new();
    for (at, part) in parts.iter().enumerate() {
        if is_slice(part) {
            // systemd names a slice by all that are above it.
            let above = slices.last().and_then(|above| above.strip_suffix(".slice"));
            let rest = above.and_then(|above| part.strip_prefix(above));
            if rest.is_some_and(|rest| rest.starts_with('-')) {
                slices.pop();
            }
            slices.push(part);
            continue;
        }
        let begins_systemd = |next: &&str| is_slice(next) || is_unit(next);
        if *part == "ns"
            && matches!(parts[..at], [.., "lxc", _])
            && parts.get(at + 1).is_some_and(begins_systemd)
        {
            continue;
        }
        let is_other_systemd = !slices.is_empty() || *part == "init.scope";
        if is_unit(part) {
            slices.clear();
        }
        slices.push(part);
        add(&mut name, &slices, is_other_systemd);
        slices.clear();
    }
    if !slices.is_empty() {
        add(&mut name, &slices, true);
    }
    name
}

fn add(name: &mut String, parts: &[&str], is_other_systemd: bool) {
    if !name.is_empty() {
        name.push(if is_other_systemd { ':' } else { '/' });
    }
    name.push_str(&parts.join("/"));
}

/// Makes a name no longer than [`LONGEST`].
fn cut(name: String) -> String {
    if name.len() <= LONGEST {
        return name;
    }
    // FNV-1a: the same number in every version of the exporter.
    let number = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |number, byte| {
            (number ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    let mut end = LONGEST - 17;
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}~{number:016x}", &name[..end])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const ID: &str = "8b1f0e7c6d5a4b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2f1a0b9c";

    #[test]
    fn a_name_says_whose_a_cgroup_is_and_no_more() {
        let user = "/user.slice/user-1000.slice/user@1000.service";
        let of_user = "user@1000.service";
        for (path, expected) in [
            ("/", "/"),
            ("/init.scope", "init.scope"),
            ("/system.slice", "system.slice"),
            ("/system.slice/ssh.service", "ssh.service"),
            ("/system.slice/ssh.service/deeper", "ssh.service/deeper"),
            (
                "/system.slice/system-getty.slice/getty@tty1.service",
                "getty@tty1.service",
            ),
            ("/system.slice/system-getty.slice", "system-getty.slice"),
            ("/a.slice/b.slice", "a.slice/b.slice"),
            ("/system.slice/odd", "system.slice/odd"),
            (
                "/user.slice/user-1000.slice/session-3.scope",
                "session-3.scope",
            ),
            ("/kubepods/burstable", "kubepods/burstable"),
            // A user's systemd, and containers without root below it.
            (user, of_user),
            (
                &format!("{user}/init.scope"),
                &format!("{of_user}:init.scope"),
            ),
            (
                &format!("{user}/app.slice/a.service"),
                &format!("{of_user}:a.service"),
            ),
            (
                &format!("{user}/user.slice/libpod-{ID}.scope/container"),
                &format!("{of_user}:libpod-{ID}.scope/container"),
            ),
            // LXC, Incus and Proxmox beside the host's own units.
            ("/system.slice/nginx.service", "nginx.service"),
            (
                "/lxc/101/ns/system.slice/nginx.service",
                "lxc/101:nginx.service",
            ),
            (
                "/lxc/101/system.slice/nginx.service",
                "lxc/101:nginx.service",
            ),
            ("/lxc/101/ns/init.scope", "lxc/101:init.scope"),
            ("/lxc/101/ns", "lxc/101/ns"),
            (
                "/lxc.payload.web/system.slice/nginx.service",
                "lxc.payload.web:nginx.service",
            ),
            ("/lxc.monitor.web", "lxc.monitor.web"),
            // Docker in Docker.
            (&format!("/docker/{ID}/init"), &format!("docker/{ID}/init")),
            (
                &format!("/docker/{ID}/docker/{ID}"),
                &format!("docker/{ID}/docker/{ID}"),
            ),
            (
                &format!("/system.slice/docker-{ID}.scope/init"),
                &format!("docker-{ID}.scope/init"),
            ),
            (
                &format!("/system.slice/docker-{ID}.scope/system.slice/a.service"),
                &format!("docker-{ID}.scope:a.service"),
            ),
            // Batch systems below one service.
            (
                "/pbs_jobs.service/jobid/12.server",
                "pbs_jobs.service/jobid/12.server",
            ),
            (
                "/system.slice/condor.service/htcondor/slot1_1",
                "condor.service/htcondor/slot1_1",
            ),
            // Slurm.
            (
                "/system.slice/slurmstepd.scope/job_12/step_0/user/task_0",
                "job_12/step_0",
            ),
            (
                "/system.slice/slurmstepd.scope/job_12/step_0/slurm",
                "job_12/step_0",
            ),
            ("/system.slice/slurmstepd.scope/job_12", "job_12"),
            (
                "/system.slice/slurmstepd.scope/s5K1/step_batch/user/task_special",
                "s5K1/step_batch",
            ),
            (
                "/system.slice/slurmstepd.scope/system",
                "slurmstepd.scope/system",
            ),
            (
                &format!("{user}/slurmstepd.scope/job_12/step_0"),
                &format!("{of_user}:job_12/step_0"),
            ),
            (
                "/system.slice/notslurmstepd.scope/job_12/step_0",
                "notslurmstepd.scope/job_12/step_0",
            ),
        ] {
            assert_eq!(name(path), expected, "{path}");
        }
    }

    #[test]
    fn no_two_cgroups_of_the_cases_have_one_name() {
        let mut names = HashMap::new();
        for case in ["slurm-sluid", "odd-host-paths"] {
            let file = format!(
                "{}/tests/cases/{case}/paths.txt",
                env!("CARGO_MANIFEST_DIR")
            );
            let text = std::fs::read_to_string(file).expect("a case");
            for path in text.lines().filter(|line| line.starts_with('/')) {
                if let Some(other) = names.insert(name(path), path.to_owned()) {
                    panic!("{path} and {other} are both {}", name(path));
                }
            }
        }
        assert!(names.len() > 20, "{names:?}");
        assert!(names.contains_key("job_12/step_0"), "{names:?}");
    }

    #[test]
    fn what_is_charged_is_what_whoever_is_inside_cannot_choose() {
        for (path, expected) in [
            ("/", "/"),
            ("/system.slice/ssh.service/deeper", "ssh.service"),
            (
                "/user.slice/user-1000.slice/user@1000.service/x.service/y",
                "user@1000.service",
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/slurmstepd.scope/job_1/step_1",
                "user@1000.service",
            ),
            ("/lxc/101/ns/system.slice/a.service", "lxc/101"),
            ("/lxc.payload.web/a.service", "lxc.payload.web"),
            ("/docker/abc/init", "docker/abc"),
            (
                "/system.slice/slurmstepd.scope/s5K1/step_0/user/task_0",
                "s5K1/step_0",
            ),
        ] {
            assert_eq!(outer(path), expected, "{path}");
        }
    }

    #[test]
    fn a_long_name_is_cut_and_still_its_own() {
        let deep = |last: &str| name(&format!("/x.service/{}{last}", "ä/".repeat(300)));
        let (a, b) = (deep("a"), deep("b"));
        assert!(a.len() <= LONGEST && a != b, "{a} {b}");
        assert_eq!(a, deep("a"));
    }
}
