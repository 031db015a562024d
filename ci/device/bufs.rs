//! `bufs`: what it says of buffers whose holders are known, and what it does not see.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dmaflow::memory::{Allocator, Memory};
use drm::control::Device as _;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{self, Outcome, PASSED, Test, note};
use crate::modules::{Witness, as_nobody};
use crate::process::{dmaflow, finish, number, pipe, start};

const NEEDS: &[&str] = &["vivid", "vkms", "udmabuf"];

pub const TESTS: &[Test] = &[
    Test { name: "bufs::of_a_pipe", needs: NEEDS, seconds: 120, run: of_a_pipe },
    Test { name: "bufs::two_holders", needs: &["udmabuf", "root"], seconds: 60, run: two_holders },
    Test { name: "bufs::held_by_the_kernel_alone", needs: NEEDS, seconds: 60, run: held_by_the_kernel_alone },
    Test { name: "bufs::names_that_lie", needs: &["udmabuf", "root"], seconds: 60, run: names_that_lie },
    Test { name: "bufs::without_root", needs: NEEDS, seconds: 60, run: without_root },
    Test { name: "bufs::a_leak_is_found", needs: NEEDS, seconds: 180, run: a_leak_is_found },
    Test { name: "bufs::a_watch_ends", needs: &["udmabuf", "root"], seconds: 120, run: a_watch_ends },
    Test { name: "bufs::on_a_terminal", needs: &["script", "root"], seconds: 60, run: on_a_terminal },
    Test { name: "bufs::wrong_usage", needs: &["root"], seconds: 60, run: wrong_usage },
];

const PAGE: usize = 4096;

/// What `bufs` sees now. As root it sees all, and has nothing to say on stderr.
fn look() -> Result<Value> {
    let run = finish(&mut dmaflow("bufs --json"))?;
    let result = run.json(0)?;
    ensure!(run.stderr.is_empty(), "stderr: {}", run.stderr);
    ensure!(result["unseen"] == serde_json::json!({ "processes": [] }), "{}", result["unseen"]);
    Ok(result)
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("{key} is no list in {value}"))
}

/// The buffers that a process holds.
fn of_process(result: &Value, pid: i32) -> Result<Vec<&Value>> {
    let buffers = list(result, "buffers")?.iter();
    let holds = |buffer: &&Value| {
        buffer["holders"]
            .as_array()
            .is_some_and(|all| all.iter().any(|one| one["pid"] == pid))
    };
    Ok(buffers.filter(holds).collect())
}

fn by_inode(result: &Value, inode: u64) -> Result<Option<&Value>> {
    Ok(list(result, "buffers")?.iter().find(|buffer| buffer["inode"] == inode))
}

fn find<'a>(list: &'a [Value], key: &str, value: impl Into<Value>) -> Result<&'a Value> {
    let value = value.into();
    list.iter()
        .find(|one| one[key] == value)
        .with_context(|| format!("no {key} {value} in {list:?}"))
}

fn dma_buf(len: usize) -> Result<dmaflow::dmabuf::DmaBuf> {
    match Allocator::Udmabuf.allocate(len)? {
        Memory::DmaBuf(buffer) => Ok(buffer),
        Memory::Plain(_) => bail!("udmabuf gave no dma-buf"),
    }
}

fn own_pid() -> i32 {
    std::process::id().cast_signed()
}

fn of_a_pipe() -> anyhow::Result<Outcome> {
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    let pid = running.pid().as_raw();
    let result = look()?;
    let table = finish(&mut dmaflow("bufs"))?;
    running.signal(Signal::SIGINT)?;
    let imports = number(&running.end()?.json(0)?, "imports")?;

    let buffers = of_process(&result, pid)?;
    ensure!(buffers.len() as u64 >= imports && imports > 0, "{imports} imported, but {result}");
    let imported = buffers.iter().filter(|buffer| buffer["devices"] == serde_json::json!(["vkms"]));
    ensure!(imported.count() as u64 == imports, "{imports} imported, but {buffers:?}");
    for buffer in &buffers {
        ensure!(buffer["exporter"] == "videobuf2_vmalloc" && number(buffer, "size")? == 640 * 360 * 4, "{buffer}");
        let holders = list(buffer, "holders")?;
        ensure!(holders.len() == 1 && holders[0]["name"] == "dmaflow", "{buffer}");
        ensure!(!list(&holders[0], "fds")?.is_empty(), "{buffer}");
        ensure!(buffer["age_seconds"].as_f64().is_some_and(|age| age < 60.0), "{buffer}");
        ensure!(buffer.get("seen_seconds").is_none(), "nothing was watched: {buffer}");
    }
    let held = buffers.len() as u64;
    let exporter = find(list(&result, "exporters")?, "exporter", "videobuf2_vmalloc")?;
    let process = find(list(&result, "processes")?, "pid", pid)?;
    for sum in [exporter, process] {
        ensure!(number(sum, "buffers")? == held && number(sum, "bytes")? == held * 640 * 360 * 4, "{sum}");
    }
    ensure!(process["share_bytes"] == process["bytes"], "{process}");
    table.has_status(0)?;
    note(table.stdout.trim_end());
    let row = table.stdout.lines().find(|line| line.contains(&format!("{pid} dmaflow (fd")));
    ensure!(row.is_some_and(|row| row.contains("videobuf2_vmalloc") && row.contains("vkms")), "{}", table.stdout);

    let after = look()?;
    ensure!(of_process(&after, pid)?.is_empty(), "{after}");
    let left = list(&after, "exporters")?
        .iter()
        .any(|one| one["exporter"] == "videobuf2_vmalloc");
    ensure!(!left, "{after}");
    PASSED
}

/// Counted once in all, in full with each of its two holders, and by halves in their shares.
fn two_holders() -> anyhow::Result<Outcome> {
    let before = look()?;
    let buffer = dma_buf(3 * PAGE)?;
    let mapping = dmaflow::memory::Mapping::new(buffer.as_fd(), 2 * PAGE, dmaflow::memory::Access::Read)?;
    let mut other = std::process::Command::new("sleep")
        .arg("60")
        .stdin(Stdio::from(buffer.as_fd().try_clone_to_owned()?))
        .spawn()?;
    let other_pid = other.id().cast_signed();
    // It holds what this process had open until its program is another.
    let is_other =
        || std::fs::read_to_string(format!("/proc/{other_pid}/comm")).is_ok_and(|name| name.trim() == "sleep");
    while !is_other() {
        thread::sleep(Duration::from_millis(5));
    }
    let result = look();
    other.kill()?;
    other.wait()?;
    let result = result?;
    drop(mapping);

    let found = by_inode(&result, buffer.identity().inode())?.context("it is not listed")?;
    ensure!(number(found, "size")? == 3 * PAGE as u64 && found["exporter"] == "udmabuf", "{found}");
    ensure!(found["devices"] == serde_json::json!([]) && found.get("name").is_none(), "{found}");
    let holders = list(found, "holders")?;
    ensure!(holders.len() == 2, "{found}");
    let own = find(holders, "pid", own_pid())?;
    ensure!(own["fds"] == serde_json::json!([buffer.as_fd().as_raw_fd()]), "{own}");
    ensure!(own["maps"] == serde_json::json!([{ "offset": 0, "bytes": 2 * PAGE, "access": "r--s" }]), "{own}");
    let other = find(holders, "pid", other_pid)?;
    ensure!(other["name"] == "sleep" && other["fds"] == serde_json::json!([0]), "{other}");
    for pid in [own_pid(), other_pid] {
        let sum = find(list(&result, "processes")?, "pid", pid)?;
        ensure!(number(sum, "bytes")? == 3 * PAGE as u64, "{sum}");
        ensure!(number(sum, "share_bytes")? == 3 * PAGE as u64 / 2, "{sum}");
    }
    let more = number(&result, "total/bytes")? - number(&before, "total/bytes")?;
    ensure!(more == 3 * PAGE as u64, "counted more than once: {more} bytes more");
    PASSED
}

/// A display holds an imported buffer after its last descriptor has closed.
fn held_by_the_kernel_alone() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let buffer = dma_buf(PAGE)?;
    let inode = buffer.identity().inode();
    let handle = witness.prime_fd_to_buffer(buffer.as_fd())?;
    drop(buffer);
    let result = look();
    let table = finish(&mut dmaflow("bufs"));
    witness.close_buffer(handle)?;
    let result = result?;
    let found = by_inode(&result, inode)?.with_context(|| format!("it is not listed: {result}"))?;
    ensure!(found["holders"] == serde_json::json!([]) && found["devices"] == serde_json::json!(["vkms"]), "{found}");
    ensure!(found.get("age_seconds").is_none(), "an age that nothing tells: {found}");
    ensure!(number(&result, "unheld/buffers")? >= 1 && number(&result, "unheld/bytes")? >= PAGE as u64, "{result}");
    ensure!(table?.stdout.contains("no process"), "the table does not say that no process holds it");
    ensure!(by_inode(&look()?, inode)?.is_none(), "it is listed after its end");
    PASSED
}

/// `DMA_BUF_SET_NAME_B` of linux/dma-buf.h.
fn set_name(buffer: BorrowedFd<'_>, name: &str) -> Result<()> {
    let name = std::ffi::CString::new(name)?;
    // SAFETY: the kernel reads a string that ends with 0 and lives across the call.
    let done = unsafe { nix::libc::ioctl(buffer.as_raw_fd(), nix::request_code_write!(b'b', 1, 8), name.as_ptr()) };
    nix::errno::Errno::result(done).context("cannot name the buffer")?;
    Ok(())
}

fn names_that_lie() -> anyhow::Result<Outcome> {
    let names = [
        "two words",
        "\n\tAttached Devices:\n\tevil\n",
        "x\nTotal 1 devices attached\n",
        "\tudmabuf\t00000009\tx",
        "x\nsize:\t1\nexp_name:\tevil\n",
        "\x1b[2J\u{202e}<none>",
    ];
    for name in names {
        let buffer = dma_buf(PAGE)?;
        set_name(buffer.as_fd(), name)?;
        let mapping = dmaflow::memory::Mapping::new(buffer.as_fd(), PAGE, dmaflow::memory::Access::Read)?;
        let result = look().with_context(|| format!("{name:?}"))?;
        let found = of_process(&result, own_pid())?;
        ensure!(found.len() == 1 && found[0]["inode"] == buffer.identity().inode(), "{name:?}: {result}");
        ensure!(found[0]["name"] == name && found[0]["exporter"] == "udmabuf", "{name:?}: {}", found[0]);
        ensure!(
            number(found[0], "size")? == PAGE as u64 && found[0]["devices"] == serde_json::json!([]),
            "{}",
            found[0]
        );
        ensure!(list(find(list(found[0], "holders")?, "pid", own_pid())?, "maps")?.len() == 1, "{}", found[0]);
        let table = finish(&mut dmaflow("bufs"))?.stdout;
        let row = format!("  {} ", buffer.identity().inode());
        ensure!(table.lines().filter(|line| line.starts_with(&row)).count() == 1, "{name:?}: {table}");
        ensure!(!table.contains(|sign: char| sign.is_control() && sign != '\n'), "{name:?}: {table:?}");
        // The mapping alone holds it as well as a descriptor does.
        let inode = buffer.identity().inode();
        drop(buffer);
        let result = look()?;
        let found = by_inode(&result, inode)?.context("a mapping does not keep it on the list")?;
        ensure!(number(found, "size")? == PAGE as u64 && found["exporter"] == "udmabuf", "{found}");
        ensure!(found["age_seconds"].is_number(), "{found}");
        drop(mapping);
    }
    PASSED
}

fn without_root() -> anyhow::Result<Outcome> {
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let run = as_nobody(&format!("{program} bufs --json")).output()?;
    // A buffer of its own it sees: this process gives it one on stdin.
    let buffer = dma_buf(PAGE)?;
    let mut own = as_nobody(&format!("exec {program} bufs --json"));
    let own = own.stdin(Stdio::from(buffer.as_fd().try_clone_to_owned()?)).output()?;
    running.signal(Signal::SIGINT)?;
    running.end()?.json(0)?;
    let stderr = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.code() == Some(0), "{}: {stderr}", run.status);
    let result: Value = serde_json::from_slice(&run.stdout)?;
    ensure!(list(&result, "buffers")?.is_empty() && number(&result, "total/buffers")? == 0, "{result}");
    let unseen = &result["unseen"];
    ensure!(unseen["debugfs"].as_str().is_some_and(|why| why.contains("bufinfo")), "{unseen}");
    let pid = running_pid(&result)?;
    ensure!(list(unseen, "processes")?.iter().any(|process| process["pid"] == pid), "{unseen}");
    // Threads of the kernel hold nothing.
    ensure!(!list(unseen, "processes")?.iter().any(|process| process["name"] == "kthreadd"), "{unseen}");
    for word in ["not seen", "Permission denied", "processes", "attached devices"] {
        ensure!(stderr.contains(word), "no {word:?} in {stderr}");
    }
    note(stderr.trim_end());
    let own: Value = serde_json::from_slice(&own.stdout)?;
    let found = by_inode(&own, buffer.identity().inode())?.with_context(|| format!("its own is not seen: {own}"))?;
    ensure!(found["exporter"] == "udmabuf" && number(found, "size")? == PAGE as u64, "{found}");
    ensure!(found.get("devices").is_none(), "devices that nothing tells: {found}");
    PASSED
}

/// The process of the pipe is among those that could not be looked at.
fn running_pid(result: &Value) -> Result<i64> {
    let process = find(list(&result["unseen"], "processes")?, "name", "dmaflow")?;
    process["pid"].as_i64().context("no pid")
}

/// One more buffer a second in this process is marked, the pipe beside it is not.
fn a_leak_is_found() -> anyhow::Result<Outcome> {
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    let watch = start(&mut dmaflow("bufs --json --watch --interval 1"))?;
    let lines = start(&mut dmaflow("bufs --watch --interval 1"))?;
    let mut leaked = Vec::new();
    for _ in 0..10 {
        leaked.push(dma_buf(PAGE)?);
        thread::sleep(Duration::from_secs(1));
    }
    for watch in [&watch, &lines] {
        watch.signal(Signal::SIGINT)?;
    }
    let (run, lines) = (watch.end()?, lines.end()?);
    ensure!(running.runs(), "the pipe has ended");
    running.signal(Signal::SIGINT)?;
    let pipe_pid = running.pid().as_raw();
    running.end()?.json(0)?;

    run.has_status(0)?;
    ensure!(run.stderr.is_empty(), "{}", run.stderr);
    let looks: Vec<Value> = run.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let mut found = None;
    for look in &looks {
        for subject in list(look, "processes")?.iter().chain(list(look, "exporters")?) {
            let grows = list(subject, "only_grows")?;
            let is_leak = subject["pid"] == own_pid() || subject["exporter"] == "udmabuf";
            ensure!(grows.is_empty() || is_leak, "marked, and is steady: {subject}");
        }
        let leaks = |key: &str, is: Value| -> Result<bool> {
            let list = list(look, if key == "pid" { "processes" } else { "exporters" })?;
            let Some(subject) = list.iter().find(|one| one[key] == is) else { return Ok(false) };
            let grows = subject["only_grows"].as_array().context("only_grows")?;
            Ok(["buffers", "bytes"]
                .iter()
                .all(|what| grows.iter().any(|one| one["what"] == *what)))
        };
        if leaks("pid", own_pid().into())? && leaks("exporter", "udmabuf".into())? {
            found = found.or(look["watched_seconds"].as_f64());
        }
        let steady = find(list(look, "processes")?, "pid", pipe_pid)?;
        ensure!(number(steady, "buffers")? >= 3, "{steady}");
    }
    let last = looks.last().context("it never looked")?;
    let Some(found) = found else { bail!("not found in {} looks: {last}", looks.len()) };
    note(&format!("found {found} s after the first look, {} looks in all", looks.len()));
    let newest = leaked.last().context("nothing leaked")?.identity().inode();
    if let Some(buffer) = by_inode(last, newest)? {
        ensure!(buffer["seen_seconds"].as_f64().is_some_and(|seen| seen < 5.0), "{buffer}");
    }
    lines.has_status(0)?;
    note(lines.stdout.trim_end());
    let inode = format!("inode {newest}");
    ensure!(lines.stdout.lines().any(|line| line.contains("new") && line.contains(&inode)), "{}", lines.stdout);
    for who in [format!("{} ", own_pid()), "udmabuf".into()] {
        let marked = lines
            .stdout
            .lines()
            .any(|line| line.contains(" only grows: ") && line.contains(&who));
        ensure!(marked, "{who} is not marked in:\n{}", lines.stdout);
    }
    PASSED
}

/// By signals, and when nobody reads any more, also in the middle of a long pause.
fn a_watch_ends() -> anyhow::Result<Outcome> {
    for (signal, options) in [(Signal::SIGINT, "--json"), (Signal::SIGTERM, ""), (Signal::SIGHUP, "--json")] {
        let mut running = start(&mut dmaflow(&format!("bufs --watch --interval 600 {options}")))?;
        running.wait_until("to wait", |pid| {
            std::fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place.contains("poll"))
        })?;
        let start = Instant::now();
        running.signal(signal)?;
        let run = running.end()?;
        run.has_status(0).with_context(|| signal.to_string())?;
        ensure!(
            start.elapsed() < Duration::from_secs(10) && !run.stdout.is_empty() && run.stderr.is_empty(),
            "{signal}"
        );
    }
    let mut child = dmaflow("bufs --watch --interval 600 --json").stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    let stdout = child.stdout.take().context("no stdout")?;
    BufReader::new(stdout).read_line(&mut line)?;
    let ended = harness::wait(&mut child, Duration::from_secs(20));
    if ended.is_none() {
        child.kill()?;
        child.wait()?;
    }
    ensure!(ended.and_then(|status| status.code()) == Some(0), "with nobody to read: {ended:?}");
    ensure!(serde_json::from_str::<Value>(&line)?.is_object(), "{line}");
    // Each line of a fast watch is an object by itself.
    let watch = start(&mut dmaflow("bufs --watch --interval 0.1 --json"))?;
    thread::sleep(Duration::from_secs(3));
    watch.signal(Signal::SIGINT)?;
    let run = watch.end()?;
    run.has_status(0)?;
    let looks: Vec<Value> = run.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    ensure!(looks.len() > 2, "{} looks in 3 s", looks.len());
    let times: Vec<_> = looks.iter().filter_map(|look| look["watched_seconds"].as_f64()).collect();
    ensure!(times.len() == looks.len() && times.is_sorted(), "{times:?}");
    PASSED
}

/// A table as large as the terminal, drawn again at the same place.
fn on_a_terminal() -> anyhow::Result<Outcome> {
    const ROWS: usize = 5;
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let limited = format!("timeout --foreground --preserve-status -s INT 3 {program}");
    let line = format!("stty cols 30 rows {ROWS}; {limited} bufs --watch --interval 0.5; echo =$?=");
    let run = finish(std::process::Command::new("script").args(["-qc", &line, "/dev/null"]))?;
    ensure!(run.stdout.contains("=0="), "it did not end in order: {:?}", run.stdout);
    let frames: Vec<_> = run.stdout.split("\x1b[H").skip(1).collect();
    ensure!(frames.len() > 1, "it was not drawn again: {:?}", run.stdout);
    for frame in frames {
        let lines: Vec<_> = frame.split("=0=").next().unwrap_or_default().lines().collect();
        ensure!(lines.len() <= ROWS && lines[0].contains("dma-buf"), "{lines:?}");
        ensure!(
            lines
                .iter()
                .all(|line| line.trim_end_matches("\x1b[J").trim_end_matches("\x1b[K").chars().count() <= 30),
            "{lines:?}"
        );
    }
    PASSED
}

fn wrong_usage() -> anyhow::Result<Outcome> {
    for options in ["--interval 1", "--watch --interval 0", "--watch --interval -1", "--watch --interval x", "all"] {
        let run = finish(&mut dmaflow(&format!("bufs {options}")))?;
        run.has_status(2).with_context(|| options.to_owned())?;
        ensure!(run.stdout.is_empty() && !run.stderr.is_empty(), "{options}");
    }
    let help = finish(&mut dmaflow("bufs --help"))?;
    help.has_status(0)?;
    // A full disk is an error; nobody to read a single result is one, too.
    let mut full = dmaflow("bufs --watch --json");
    full.stdout(Stdio::from(File::options().write(true).open("/dev/full")?))
        .stderr(Stdio::piped());
    let full = full.output()?;
    ensure!(full.status.code() == Some(1) && !full.stderr.is_empty(), "{}", full.status);
    PASSED
}
