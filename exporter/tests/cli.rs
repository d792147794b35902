// SPDX-License-Identifier: Apache-2.0
//! The real binary as a user meets it: mistakes, hosts that lack something, and what it then says and serves.

mod common;

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use chandra::{VERSION, args::Args, families::Kind, reference, scrape, signals::SIGNALS};
use clap::CommandFactory;
use common::{Exporter, Pod, Scrape, build, may_trace, run, skip, succeeds, write_pods};

/// In which any exporter ends that is told to, on a busy machine.
const ENDS: Duration = Duration::from_secs(60);

/// The binary, without what the environment of the tests could tell it.
fn chandra() -> Command {
    by(Command::new(build().join("chandra")))
}

fn by(mut command: Command) -> Command {
    for (name, _) in env::vars_os() {
        let ours = name.to_string_lossy().starts_with("CHANDRA_");
        if ours || name == "NODE_NAME" || name == "KUBECONFIG" || name == "KUBERNETES_SERVICE_HOST"
        {
            command.env_remove(name);
        }
    }
    command
}

/// Runs a command that ends by itself, and returns its exit code, standard output and standard error.
fn finish(mut command: Command) -> (Option<i32>, String, String) {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let end = Instant::now() + Duration::from_secs(60);
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > end {
            child.kill().expect("a child");
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("it has ended");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Runs what the user has to mend, and asserts on the words of the one line that says so.
fn refused(mut command: Command, args: &[&str], words: &[&str]) {
    command.args(args);
    let (code, out, err) = finish(command);
    assert_eq!(code, Some(2), "{args:?}: {err}");
    assert_eq!(out, "", "{args:?}");
    assert_eq!(err.lines().count(), 1, "{args:?}: {err}");
    assert!(err.starts_with("chandra: ") && err.ends_with('\n'), "{err}");
    for word in words {
        assert!(err.contains(word), "{args:?}: no {word:?} in {err}");
    }
}

/// Says if this process can make mount namespaces and drop capabilities, and prints why not.
fn is_root() -> bool {
    let root = succeeds("[ $(id -u) = 0 ] && unshare -m true && setpriv --bounding-set -all true");
    if !root {
        skip("needs root, unshare and setpriv");
    }
    root
}

/// Says if tcp attaches on this host, and prints why not.
fn can_attach() -> bool {
    let can = may_trace();
    if !can {
        skip("needs root and a kernel with BTF");
    }
    can
}

/// The binary in a mount namespace that a shell command has changed.
fn after(mounts: &str) -> Command {
    let mut command = by(Command::new("unshare"));
    let script = format!("{mounts}; exec \"$0\" \"$@\"");
    command
        .args(["-m", "sh", "-ec", &script])
        .arg(build().join("chandra"));
    command
}

/// The binary as root without a single capability.
fn powerless() -> Command {
    let mut command = by(Command::new("setpriv"));
    command
        .args(["--bounding-set", "-all", "--inh-caps", "-all"])
        .arg(build().join("chandra"));
    command
}

/// Asserts that a signal is in one state, and only in that.
fn assert_state(scrape: &Scrape, state: &str) {
    let labels = |state| [("signal", "tcp"), ("state", state)];
    assert_eq!(
        scrape.sum("chandra_signal_state", &labels(state)),
        1.0,
        "{}",
        scrape.text
    );
    assert_eq!(
        scrape.sum("chandra_signal_state", &[("signal", "tcp")]),
        1.0,
        "{}",
        scrape.text
    );
}

/// How many eBPF programs and maps a process holds.
fn held_in_kernel(exporter: &Exporter) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", exporter.child.id())).expect("it runs");
    let links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().contains("bpf"))
        .count()
}

#[test]
fn a_wrong_flag_is_refused_in_one_line() {
    let refused = |args: &[&str], words: &[&str]| refused(chandra(), args, words);
    refused(&["--fast"], &["--fast", "chandra --help"]);
    refused(
        &["--retension", "5m"],
        &["a similar argument exists: '--retention'"],
    );
    refused(&["serve"], &["serve", "chandra --help"]);
    refused(&["check", "--fast"], &["--fast", "chandra --help"]);
    refused(
        &["--retention"],
        &["--retention <DURATION>", "value is required"],
    );
    for bad in ["5", "0s", "5 m", "-1s", "", "soon", "5m\n"] {
        let flag = format!("--retention={bad}");
        refused(&[&flag], &["--retention <DURATION>"]);
    }
    refused(
        &["--retention", "5"],
        &["whole number with s, m or h", "5m"],
    );
    let names: Vec<_> = SIGNALS.iter().map(|entry| entry.name).collect();
    refused(
        &["--disable", "tpc"],
        &["'tpc'", "the signals are", &names.join(", ")],
    );
    refused(&["--disable", "tcp,"], &["the signals are"]);
    refused(&["--max-owners", "many"], &["'many'", "--max-owners <N>"]);
    refused(&["--log.level", "a=b=c"], &["--log.level <LEVEL>"]);
    refused(&["--pods", "none", "check"], &["check", "--pods"]);
    refused(
        &["--nccl.salt-file", "/nowhere"],
        &["--nccl.salt-file <FILE>", "No such file"],
    );
    refused(
        &["--nccl.salt-file", "/dev/null"],
        &["--nccl.salt-file <FILE>", "16 to 4096 bytes"],
    );
}

#[test]
fn check_says_what_pages_tell_of_communicators() {
    let folder = tempfile::tempdir().expect("a folder");
    let salt = folder.path().join("salt");
    fs::write(&salt, "a secret of the whole cluster").expect("written");
    let says = |salt: Option<&std::path::Path>| {
        let mut command = chandra();
        command.arg("check");
        if let Some(salt) = salt {
            command.arg("--nccl.salt-file").arg(salt);
        }
        let (_, out, _) = finish(command);
        let line = out.lines().find(|line| line.contains("NCCL salt"));
        line.expect("a line").to_owned()
    };
    let without = says(None);
    assert!(
        without.starts_with("no ") && without.contains("--nccl.salt-file"),
        "{without}"
    );
    let with = says(Some(&salt));
    assert!(
        with.starts_with("ok ") && with.contains("keyed hash"),
        "{with}"
    );
}

#[test]
fn a_wrong_environment_variable_is_refused_as_its_flag_is() {
    let mut command = chandra();
    command.env("CHANDRA_RETENTION", "5");
    refused(command, &[], &["--retention <DURATION>", "5m"]);
    let mut command = chandra();
    command.env("CHANDRA_DISABLE", "tpc");
    refused(command, &[], &["the signals are"]);
}

#[test]
fn an_address_that_cannot_be_listened_on_is_refused() {
    let listen = |address: &str, words: &[&str]| {
        refused(chandra(), &["--web.listen-address", address], words);
    };
    for bad in [
        "9970",
        "127.0.0.1",
        "localhost:http",
        "::1:9970",
        "",
        ":70000",
    ] {
        listen(
            bad,
            &[
                "--web.listen-address takes HOST:PORT or :PORT",
                "127.0.0.1:9970",
            ],
        );
    }
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    listen(
        &address,
        &[
            &address,
            "already in use",
            "another address with --web.listen-address",
        ],
    );
    // TEST-NET-1 is nobody's (RFC 5737).
    listen("192.0.2.1:9970", &["192.0.2.1", "--web.listen-address"]);
}

#[test]
fn a_pods_file_that_cannot_be_used_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let pods = |path: &str, words: &[&str]| refused(chandra(), &["--pods", path], words);
    let help = "--pods takes a file with a PodList in JSON, kube or none";
    let missing = path("missing.json");
    pods(&missing, &[&missing, "No such file", help]);
    pods(&path("two\nlines.json"), &["No such file", help]);
    pods("", &["No such file", help]);
    pods("Kube", &["cannot read Kube", help]);
    let folder_path = folder.path().display().to_string();
    pods(&folder_path, &[&folder_path, "not a regular file", help]);
    for malformed in [
        "",
        "{",
        "[]",
        "{\"items\": 7}",
        "{\"kind\": \"ServiceList\", \"items\": []}",
    ] {
        let file = path("malformed.json");
        fs::write(&file, malformed).expect("written");
        pods(
            &file,
            &[&file, "kubectl get pods -A -o json", " at line ", help],
        );
    }
    let mut command = chandra();
    command.env("CHANDRA_PODS", &missing);
    refused(command, &[], &[&missing, help]);
}

#[test]
fn pods_from_kubernetes_need_a_node_name_and_credentials() {
    let home = tempfile::tempdir().expect("a folder");
    let outside = || {
        let mut command = chandra();
        command.env("HOME", home.path());
        command
    };
    let kube = ["--pods", "kube"];
    refused(
        outside(),
        &kube,
        &["NODE_NAME", "spec.nodeName", "--node-name"],
    );
    let mut command = outside();
    command.env("NODE_NAME", "");
    refused(command, &kube, &["NODE_NAME", "--node-name"]);
    let kube = ["--pods", "kube", "--node-name", "node-7"];
    let instead = "--pods FILE or --pods none";
    refused(
        outside(),
        &kube,
        &["not in a cluster", "KUBECONFIG", instead],
    );
    let missing = home.path().join("missing.yaml");
    let mut command = outside();
    command.env("KUBECONFIG", &missing);
    refused(
        command,
        &kube,
        &["not in a cluster", "missing.yaml", "No such file", instead],
    );
    let malformed = home.path().join("malformed.yaml");
    fs::write(&malformed, "clusters: [\n  a: }\n").expect("written");
    let mut command = outside();
    command.env("KUBECONFIG", &malformed);
    refused(command, &kube, &["kubeconfig", instead]);
    // Inside a cluster it is the default.
    let mut command = outside();
    command.env("KUBERNETES_SERVICE_HOST", "127.0.0.1");
    refused(command, &[], &["--pods kube needs the node's name"]);
}

#[test]
fn an_api_server_that_cannot_be_reached_is_waited_for_and_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("kubeconfig");
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: \"https://{}\"}}}}]\n\
         users: [{{name: u, user: {{token: secret-token}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n",
        port.expect("a port")
    );
    fs::write(&kubeconfig, text).expect("written");
    let command = || {
        let mut command = chandra();
        command.env("KUBECONFIG", &kubeconfig);
        command
    };
    let args = [
        "--pods",
        "kube",
        "--node-name",
        "node-7",
        "--disable",
        "tcp",
    ];
    let shy = Exporter::start_by(&mut command(), &args);
    let page = shy.page_until("it tells of the API server", |page| {
        page.contains("the API server does not tell the pods")
    });
    assert!(!page.contains("refused"), "{page}");
    drop(shy);
    let args = [&args[..], &["--web.show-paths"]].concat();
    let mut exporter = Exporter::start_by(&mut command(), &args);
    let age = || exporter.scrape().sum("chandra_pods_age_seconds", &[]);
    let first = age();
    thread::sleep(Duration::from_millis(1200));
    let second = age();
    assert!(second > first + 1.0 && second < 60.0, "{first} → {second}");
    let page = exporter.get("/");
    for words in [
        "cannot ask the API server",
        "Connection refused",
        "It has not answered yet",
    ] {
        assert!(page.contains(words), "no {words:?} in {page}");
    }
    assert!(!page.contains("secret-token"));
    let (status, took) = exporter.stop("TERM");
    assert_eq!(status.code(), Some(0));
    assert!(took < ENDS, "{took:?}");
}

#[test]
fn without_capabilities_it_serves_and_says_what_to_add() {
    if !is_root() || !can_attach() {
        return;
    }
    let exporter = Exporter::start_by(&mut powerless(), &["--pods", "none"]);
    let scrape = exporter.scrape();
    assert_state(&scrape, "failed");
    let hooks = |labels: &[(&str, &str)]| scrape.sum("chandra_hook_info", labels);
    assert!(hooks(&[("signal", "tcp")]) > 0.0);
    assert_eq!(
        hooks(&[("signal", "tcp")]),
        hooks(&[("signal", "tcp"), ("reason", "no_permission")])
    );
    let page = exporter.get("/");
    for words in [
        "<b>tcp does not work (2 of 2 hooks missing).</b>",
        "no_permission",
        "run as root or with CAP_BPF and CAP_PERFMON",
    ] {
        assert!(page.contains(words), "no {words:?} in {page}");
    }
    assert_eq!(held_in_kernel(&exporter), 0);

    let mut check = powerless();
    check.arg("check");
    let (code, out, err) = finish(check);
    assert_eq!((code, &*err), (Some(1), ""), "{out}");
    assert!(
        out.contains("no  capabilities  CAP_BPF and CAP_PERFMON"),
        "{out}"
    );
    assert!(out.contains("no  tcp           failed"), "{out}");
}

#[test]
fn an_ordinary_user_is_told_the_same() {
    if !is_root() || !can_attach() {
        return;
    }
    let mut user = by(Command::new("setpriv"));
    user.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
    user.arg(build().join("chandra"));
    if !succeeds(&format!(
        "setpriv --reuid 65534 --regid 65534 --clear-groups test -x {}",
        build().join("chandra").display()
    )) {
        return skip("the build is in a folder that only root can enter");
    }
    let mut exporter = Exporter::start_by(&mut user, &["--pods", "none"]);
    let scrape = exporter.scrape();
    assert_state(&scrape, "failed");
    assert!(scrape.has("chandra_hook_info", "reason=\"no_permission\""));
    assert_eq!(exporter.stop("TERM").0.code(), Some(0));
}

#[test]
fn without_btf_it_serves_and_says_so() {
    if !is_root() {
        return;
    }
    let without = || after("mount -t tmpfs tmpfs /sys/kernel/btf");
    if !Path::new("/sys/kernel/btf").is_dir() {
        return skip("this kernel has no BTF that could be hidden");
    }
    let exporter = Exporter::start_by(&mut without(), &["--pods", "none"]);
    let scrape = exporter.scrape();
    assert_state(&scrape, "failed");
    let hooks = |labels: &[(&str, &str)]| scrape.sum("chandra_hook_info", labels);
    assert!(hooks(&[("signal", "tcp")]) > 0.0);
    assert_eq!(hooks(&[("signal", "tcp")]), hooks(&[("reason", "no_btf")]));
    assert!(exporter.get("/").contains("CONFIG_DEBUG_INFO_BTF"));

    let mut check = without();
    check.arg("check");
    let (code, out, _) = finish(check);
    assert_eq!(code, Some(1));
    assert!(
        out.contains("no  BTF           /sys/kernel/btf/vmlinux does not exist"),
        "{out}"
    );
}

#[test]
fn without_cgroup_v2_it_serves_and_says_that_nothing_is_attributed() {
    if !is_root() || !can_attach() {
        return;
    }
    let v2 = common::cgroup_root().display().to_string();
    let folder = tempfile::tempdir().expect("a folder");
    let nothing = "for at in $(awk '$0 ~ / - cgroup2? / { print $5 }' /proc/self/mountinfo); do umount -l $at; done";
    let only_v1 = format!(
        "{nothing}; mount -t cgroup -o none,name=chandra cgroup {}",
        folder.path().display()
    );
    let mut hosts = vec![(
        nothing,
        "no cgroup file system is mounted",
        "--path.cgroupfs",
    )];
    if succeeds(&format!(
        "unshare -m sh -ec '{}'",
        only_v1.replace('\'', "'\\''")
    )) {
        let remedy = "systemd.unified_cgroup_hierarchy=1";
        hosts.push((&only_v1, "only cgroup v1 is mounted", remedy));
    } else {
        skip("this kernel cannot mount cgroup v1");
    }
    for (mounts, what, remedy) in hosts {
        let exporter = Exporter::start_by(&mut after(mounts), &["--pods", "none"]);
        let scrape = exporter.scrape();
        assert_state(&scrape, "up");
        assert!(scrape.has("chandra_hook_info", "reason=\"no_cgroup_v2\""));
        let page = exporter.get("/");
        assert!(page.contains(what) && page.contains(remedy), "{page}");
        let mut check = after(mounts);
        check.arg("check");
        let (code, out, _) = finish(check);
        assert_eq!(code, Some(0), "tcp works, with less: {out}");
        let line = out
            .lines()
            .find(|line| line.contains(" cgroups "))
            .unwrap_or_default();
        assert!(line.starts_with("no  ") && line.contains(what), "{out}");
        assert!(line.contains(remedy), "{out}");
    }

    // Named, it is used wherever it is.
    let mut check = chandra();
    check.args(["check", "--path.cgroupfs", &v2]);
    let (_, out, _) = finish(check);
    assert!(
        out.contains(&format!("ok  cgroups       v2 at {v2}")),
        "{out}"
    );
}

#[test]
fn a_folder_that_is_not_cgroup_v2_is_not_walked() {
    let folder = tempfile::tempdir().expect("a folder");
    fs::create_dir_all(folder.path().join("a/b/c")).expect("folders");
    let path = folder.path().display().to_string();
    let missing = format!("{path}/missing");
    for path in [&path, &missing] {
        let args = ["--path.cgroupfs", path, "--disable", "tcp"];
        let exporter = Exporter::start_by(&mut chandra(), &args);
        let page = exporter.get("/");
        assert!(page.contains("nothing can be attributed to pods"), "{page}");
        assert!(
            page.contains("<p>Cgroups: 1."),
            "only the root, which is the host: {page}"
        );
        let mut check = chandra();
        check.args(["check", "--path.cgroupfs", path]);
        let (_, out, _) = finish(check);
        let line = format!("no  cgroups       {path} is not where cgroup v2 is mounted");
        assert!(out.contains(&line), "{out}");
    }
}

#[test]
fn a_signal_that_is_switched_off_attaches_nothing() {
    // All of them, since somebody else on this host may use what another signal follows.
    let all: Vec<_> = SIGNALS.iter().map(|entry| entry.name).collect();
    let all = all.join(",");
    for disabled in [&all, &format!("{all},tcp")] {
        let exporter = Exporter::start_by(&mut chandra(), &["--disable", disabled]);
        let scrape = exporter.scrape();
        assert_state(&scrape, "disabled");
        assert!(!scrape.has("chandra_hook_info", "tcp"), "{}", scrape.text);
        assert!(!scrape.has("chandra_tcp_", ""), "{}", scrape.text);
        assert!(scrape.has("chandra_lost_events_total", "signal=\"tcp\""));
        let page = exporter.get("/");
        assert!(page.contains("switched off by --disable"), "{page}");
        assert_eq!(held_in_kernel(&exporter), 0);
    }
}

#[test]
fn what_it_serves_is_what_it_declares_and_it_ends_when_told() {
    let mut exporter = Exporter::start_by(&mut chandra(), &["--pods", "none"]);
    let scrape = exporter.scrape();
    let descs = SIGNALS
        .iter()
        .flat_map(|entry| entry.descs)
        .chain(scrape::DESCS);
    let descs: Vec<_> = descs.collect();
    let mut met = BTreeSet::new();
    for series in scrape.series.keys() {
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let of_histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        let desc = descs.iter().find(|desc| {
            desc.name == name || desc.kind == Kind::Histogram && Some(desc.name) == of_histogram
        });
        let desc = desc.unwrap_or_else(|| panic!("{series} is declared nowhere"));
        met.insert(name);
        for (label, values) in desc.values {
            let value = labels
                .split_once(&format!("{label}=\""))
                .and_then(|(_, rest)| rest.split_once('"').map(|(value, _)| value));
            let declared = value.is_some_and(|value| values.contains(&value));
            assert!(declared, "{series}: {label} is one of {values:?}");
        }
    }
    assert!(met.contains("chandra_build_info") && met.contains("chandra_signal_state"));
    assert_eq!(exporter.get("/livez").trim(), "ok");
    if can_attach() {
        assert_state(&scrape, "up");
        assert!(held_in_kernel(&exporter) > 0);
        // Those that the kernel does not tell unless asked, that of a source of pods, and that of a web configuration.
        let absent = [
            "chandra_program_runs_total",
            "chandra_program_run_seconds_total",
            "chandra_pods_age_seconds",
            "chandra_web_config_last_reload_successful",
        ];
        for desc in descs {
            let may_lack = absent.contains(&desc.name)
                // Not every host has RDMA, a GPU or NCCL, and where it has, many series begin with their first event.
                || ["chandra_rdma_", "chandra_gpu_", "chandra_nccl_", "chandra_cuda_", "chandra_encryption_"].iter().any(|of| desc.name.starts_with(of));
            assert!(met.contains(desc.name) || may_lack, "no {}", desc.name);
        }
    }
    let (status, took) = exporter.stop("TERM");
    assert_eq!(status.code(), Some(0));
    assert!(took < ENDS, "{took:?}");
}

#[test]
fn a_pods_file_is_read_again_when_it_changes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("pods.json");
    let [first, second] =
        [("vllm-0", 1), ("vllm-1", 2)].map(|(name, seed)| Pod::new("inference", name, seed));
    write_pods(&path, std::slice::from_ref(&first));
    let file = path.display().to_string();
    let args = ["--pods", &file, "--disable", "tcp"];
    let exporter = Exporter::start_by(&mut chandra(), &args);
    let age = || exporter.scrape().sum("chandra_pods_age_seconds", &[]);
    let until = |what: &str, holds: &dyn Fn(&str) -> bool| exporter.page_until(what, holds);
    let page = exporter.get("/");
    assert!(page.contains("vllm-0") && page.contains(&file), "{page}");
    assert!(page.contains("Pods: 1, from"), "{page}");
    write_pods(&path, &[first.clone(), second.clone()]);
    until("a pod more", &|page| {
        page.contains("vllm-0") && page.contains("vllm-1")
    });
    write_pods(&path, &[second]);
    until("a pod less", &|page| {
        !page.contains("vllm-0") && page.contains("vllm-1")
    });
    fs::write(&path, "{").expect("written");
    until("trouble", &|page| {
        page.contains("is not what `kubectl get pods -A -o json` prints")
    });
    let before = age();
    thread::sleep(Duration::from_millis(1100));
    let stale = age();
    assert!(
        stale > before + 1.0,
        "a file that cannot be read is no answer"
    );
    assert!(
        exporter.get("/").contains("vllm-1"),
        "pods keep their names"
    );
    write_pods(&path, &[first]);
    until("an end of the trouble", &|page| {
        // Another trouble stays where the host has the hierarchy and not these pods.
        page.contains("vllm-0") && !page.contains("is not what `kubectl")
    });
    until("a low age", &|_| age() < stale);
}

#[test]
fn check_is_json_with_the_documented_fields() {
    let mut command = chandra();
    command.args(["check", "--json"]);
    let (code, out, err) = finish(command);
    assert_eq!(err, "");
    let report: serde_json::Value = serde_json::from_str(&out).expect("JSON");
    let keys = |value: &serde_json::Value| -> BTreeSet<String> {
        let object = value.as_object().expect("an object");
        object.keys().cloned().collect()
    };
    let are = |names: &[&str]| -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    };
    assert_eq!(keys(&report), are(&["ok", "host", "signals", "maps"]));
    let facts = report["host"].as_array().expect("a list");
    let mut names = Vec::new();
    for fact in facts {
        assert_eq!(keys(fact), are(&["name", "ok", "detail"]));
        assert!(fact["ok"].is_boolean() && fact["detail"].as_str().is_some_and(|d| !d.is_empty()));
        names.extend(fact["name"].as_str());
    }
    assert_eq!(
        names,
        [
            "kernel",
            "BTF",
            "capabilities",
            "lockdown",
            "tracefs",
            "cgroups",
            "Kubernetes",
            "RDMA",
            "GPU",
            "NCCL",
            "NCCL salt"
        ]
    );
    let signals = report["signals"].as_array().expect("a list");
    assert_eq!(signals.len(), SIGNALS.len());
    for (signal, entry) in signals.iter().zip(SIGNALS) {
        assert_eq!(
            keys(signal),
            are(&["name", "state", "hooks", "notes", "found"])
        );
        assert_eq!(signal["name"], entry.name);
        let hooks = signal["hooks"].as_array().expect("a list");
        assert_eq!(hooks.is_empty(), signal["state"] == "absent");
        for hook in hooks {
            assert_eq!(keys(hook), are(&["name", "method", "reason", "detail"]));
        }
    }
    let maps = ["cpus", "bytes", "bytes_at_256_cpus", "budget"];
    assert_eq!(keys(&report["maps"]), are(&maps));
    for number in maps {
        assert!(report["maps"][number].as_u64() > Some(0), "{number}");
    }
    assert_eq!(code, Some(i32::from(report["ok"] != true)));
    if can_attach() {
        assert_eq!(code, Some(0), "{out}");
        assert_eq!(report["signals"][0]["state"], "up");
    }

    let mut command = chandra();
    command.arg("check");
    let (table_code, table, _) = finish(command);
    assert_eq!(table_code, code);
    for name in names
        .into_iter()
        .chain(SIGNALS.iter().map(|entry| entry.name))
    {
        let row = |line: &str| line.get(4..).is_some_and(|line| line.starts_with(name));
        assert!(table.lines().any(row), "no {name} in\n{table}");
    }
    assert!(table.contains("KiB of kernel memory with"), "{table}");
}

#[test]
fn the_reference_and_the_version_are_printed_and_help_names_every_flag() {
    let print = |args: &[&str]| {
        let mut command = chandra();
        command.args(args);
        let (code, out, err) = finish(command);
        assert_eq!((code, &*err), (Some(0), ""), "{args:?}");
        out
    };
    assert_eq!(print(&["metrics"]), reference::markdown());
    assert_eq!(print(&["--version"]), format!("chandra {}\n", VERSION));
    let help = print(&["--help"]);
    let command = Args::command();
    for argument in command.get_arguments() {
        let long = argument.get_long().expect("every flag has a long name");
        assert!(
            help.contains(&format!("--{long} ")) || help.contains(&format!("--{long}\n")),
            "{long}"
        );
        if let Some(variable) = argument.get_env() {
            assert!(help.contains(&*variable.to_string_lossy()), "{long}");
        }
    }
    for subcommand in command.get_subcommands().filter(|one| !one.is_hide_set()) {
        assert!(
            help.contains(&format!("  {} ", subcommand.get_name())),
            "{help}"
        );
    }
    assert!(print(&["check", "--help"]).contains("--json"));
}

#[test]
fn the_profiler_plugin_is_installed_and_kept_until_it_is_told_to_end() {
    let folder = tempfile::tempdir().expect("a folder");
    let (image, node) = (folder.path().join("plugin.so"), folder.path().join("node"));
    fs::create_dir(&node).expect("made");
    refused(
        chandra(),
        &["install-nccl-profiler", &node.display().to_string()],
        &["cannot read the plugin /libnccl-profiler.so"],
    );
    fs::write(&image, b"\x7fELF").expect("written");
    let mut command = chandra();
    command.args(["install-nccl-profiler", "--keep", "--from"]);
    let mut child = command
        .args([&image, &node])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut said = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
    stdout.read_line(&mut said).expect("it speaks");
    let place = node.join("libnccl-profiler.so");
    assert_eq!(said, format!("{} is new\n", place.display()));
    assert_eq!(fs::read(place).expect("there"), b"\x7fELF");
    // Not before it listens for signals.
    let caught = || {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        u64::from_str_radix(line.expect("a mask").trim(), 16).expect("hex") & 1 << (15 - 1) != 0
    };
    let end = Instant::now() + ENDS;
    while !caught() {
        assert!(Instant::now() < end, "it does not listen for SIGTERM");
        thread::sleep(Duration::from_millis(5));
    }
    run(&format!("kill -TERM {}", child.id()));
    assert!(child.wait().expect("a child").success());
}
