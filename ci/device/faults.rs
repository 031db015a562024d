//! What goes wrong ends with status 1, one clear line, the display as it was and all memory freed.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::harness::{Outcome, PASSED, Test, note};
use crate::modules::{self, Witness, as_nobody, control, vivid};
use crate::process::{Run, State, dmaflow, finish, number, pipe, start};

const NEEDS: &[&str] = &["vivid", "vkms"];

macro_rules! tests {
    ($($name:ident $seconds:literal),* $(,)?) => {
        &[$(Test { name: concat!("faults::", stringify!($name)), needs: NEEDS, seconds: $seconds, run: $name }),*]
    };
}

pub const TESTS: &[Test] = tests![
    disconnect_while_streaming 60,
    disconnect_while_capturing_for_no_display 60,
    injected_before_the_start 120,
    fatal_streaming_error 60,
    qbuf_error_while_streaming 60,
    damaged_buffers_are_counted 60,
    damaged_buffers_alone 120,
    too_few_buffers 60,
    dropped_buffers_are_counted 60,
    another_master 60,
    no_such_device 60,
    not_a_capture_device 60,
    no_permission 60,
    what_the_camera_lacks 60,
    nothing_connected 60,
    larger_than_every_mode 60,
    frames_0 30,
    stdout_that_cannot_be_written 90,
    few_descriptors 90,
    camera_in_use 60,
];

/// Runs a command that must fail in order, and gives the line it said.
fn fails(command: &mut Command, words: &[&str]) -> Result<String> {
    let witness = Witness::new()?;
    let before = State::read();
    let run = finish(command)?;
    failed(&run, words, &before)?;
    drop(witness);
    Ok(run.stderr.trim().to_owned())
}

fn failed(run: &Run, words: &[&str], before: &State) -> Result<()> {
    run.one_line(1, words)?;
    ensure!(run.stdout.is_empty(), "{}: a result in spite of the failure: {}", run.what, run.stdout);
    before.is_back().with_context(|| run.what.clone())
}

/// Streams to the display until `fault`, and fails with these words then.
fn fails_while_streaming(options: &str, fault: &str, words: &[&str]) -> Result<()> {
    let witness = Witness::new()?;
    let before = State::read();
    let mut running = start(&mut pipe(&format!("--format XR24 --size 640x360 --frames 100000 {options}")))?;
    running.wait_until_it_shows()?;
    ensure!(before.changes().len() == 2, "while it streams the display and the dma-bufs must differ");
    control(fault)?;
    let run = running.end()?;
    failed(&run, words, &before)?;
    note(run.stderr.trim());
    drop(witness);
    Ok(())
}

fn works_again() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format XR24 --size 640x360 --frames 3"))?.json(0)?;
    ensure!(number(&result, "frames/presented")? == 3, "{result}");
    PASSED
}

fn disconnect_while_streaming() -> anyhow::Result<Outcome> {
    for present in ["fifo", "mailbox"] {
        fails_while_streaming(&format!("--present {present}"), "disconnect=1", &["/dev/video0", "disconnected"])?;
        modules::reload()?;
    }
    works_again()
}

fn disconnect_while_capturing_for_no_display() -> anyhow::Result<Outcome> {
    let before = State::read();
    let mut running = start(&mut dmaflow("pipe --from vivid --to null --json"))?;
    running.wait_until("to hold dma-bufs", |_| !before.new_dma_bufs().is_empty())?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    control("disconnect=1")?;
    failed(&running.end()?, &["/dev/video0", "disconnected"], &before)?;
    PASSED
}

/// The controls that make the next call of one sort fail; the command sets them itself, before it makes the call.
fn injected_before_the_start() -> anyhow::Result<Outcome> {
    for (name, words) in [
        ("inject_vidioc_reqbufs_error", ["allocate buffers", "/dev/video0", "the kernel log"]),
        ("inject_vidioc_qbuf_error", ["queue a buffer", "/dev/video0", "refused"]),
        ("inject_vidioc_streamon_error", ["start", "/dev/video0", "--buffers"]),
    ] {
        note(&fails(&mut pipe(&format!("--format XR24 --size 640x360 --frames 5 --control {name}=1")), &words)?);
        works_again()?;
    }
    // dmaflow makes no requests (media controller), so this one may not harm it.
    let harmless = finish(&mut pipe("--format XR24 --frames 5 --control inject_req_validate_error=1"))?.json(0)?;
    ensure!(number(&harmless, "frames/presented")? == 5, "{harmless}");
    // Every injecting control that this vivid has is known here or in a test below.
    let known = [
        "inject_vidioc_reqbufs_error",
        "inject_vidioc_qbuf_error",
        "inject_vidioc_streamon_error",
        "inject_req_validate_error",
        "inject_v4l2_buf_flag_error",
        "inject_fatal_streaming_error",
    ];
    let controls = dmaflow::v4l2::Device::find("vivid")?.controls()?;
    let new: Vec<_> = controls
        .iter()
        .map(|c| c.name.as_str())
        .filter(|name| name.starts_with("inject"))
        .collect();
    ensure!(new.len() == known.len() && new.iter().all(|name| known.contains(name)), "vivid injects {new:?}");
    PASSED
}

fn fatal_streaming_error() -> anyhow::Result<Outcome> {
    for present in ["fifo", "mailbox"] {
        fails_while_streaming(&format!("--present {present}"), "inject_fatal_streaming_error=1", &["/dev/video0"])?;
    }
    works_again()
}

fn qbuf_error_while_streaming() -> anyhow::Result<Outcome> {
    fails_while_streaming("", "inject_vidioc_qbuf_error=1", &["queue a buffer", "/dev/video0"])?;
    works_again()
}

fn damaged_buffers_are_counted() -> anyhow::Result<Outcome> {
    let options = "--format XR24 --size 640x360 --fps 60";
    let result =
        finish(&mut pipe(&format!("{options} --frames 20 --control inject_v4l2_buf_flag_error=1")))?.json(0)?;
    let counts = ["frames/captured", "frames/presented", "frames/errored", "frames/dropped_by_camera"];
    let [captured, presented, errored, _] = counts.map(|path| number(&result, path));
    ensure!((captured?, presented?, errored?) == (20, 20, 1), "{result}");
    // While streaming, three times.
    let mut running = start(&mut pipe(&format!("{options} --frames 150")))?;
    running.wait_until_it_shows()?;
    for _ in 0..3 {
        control("inject_v4l2_buf_flag_error=1")?;
    }
    let result = running.end()?.json(0)?;
    ensure!(number(&result, "frames/errored")? == 3 && number(&result, "frames/presented")? == 150, "{result}");
    PASSED
}

/// Buffers come, and no frame in any of them: that is a stall as well.
fn damaged_buffers_alone() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let mut running = start(&mut pipe("--format XR24 --size 640x360 --fps 2"))?;
    running.wait_until_it_shows()?;
    // By this process itself: starting another for each would let good frames through.
    let device = dmaflow::v4l2::Device::find("vivid")?;
    let damage = device.control("inject_v4l2_buf_flag_error")?;
    let begin = Instant::now();
    while running.runs() {
        ensure!(begin.elapsed() < Duration::from_secs(30), "it goes on without a frame");
        device.set_control(&damage, 1)?;
        std::thread::sleep(Duration::from_millis(10));
    }
    drop(device);
    // Counted from the last frame, which came a moment before.
    ensure!(begin.elapsed() >= Duration::from_secs(4), "it gave up after {:?}", begin.elapsed());
    let run = running.end()?;
    failed(&run, &["/dev/video0", "none came for 5 s", "damaged"], &before)?;
    note(run.stderr.trim());
    drop(witness);
    works_again()
}

/// One buffer is on screen, one is about to be: a source with no more than these has none to fill.
fn too_few_buffers() -> anyhow::Result<Outcome> {
    note(&fails(
        &mut dmaflow("pipe --from pattern --buffers 1 --to vkms --frames 3"),
        &["of its buffers", "more buffers"],
    )?);
    PASSED
}

fn dropped_buffers_are_counted() -> anyhow::Result<Outcome> {
    let options =
        "--format XR24 --size 640x360 --fps 60 --frames 40 --verify --control percentage_of_dropped_buffers=50";
    let result = finish(&mut pipe(options))?.json(0)?;
    let dropped = number(&result, "frames/dropped_by_camera")?;
    note(&format!("{dropped} dropped beside 40 captured"));
    // Half of them at random: of 40 captured, fewer than 12 lost has a chance below one in a million.
    ensure!(dropped >= 12, "{result}");
    ensure!(number(&result, "frames/presented")? == 40 && number(&result, "verify/wrong")? == 0, "{result}");
    PASSED
}

/// Who opens the card first is its master: this process, whose pid must be named.
fn another_master() -> anyhow::Result<Outcome> {
    let card = modules::card()?;
    let held = fs::File::options().read(true).write(true).open(&card)?;
    let before = State::read();
    let run = finish(&mut pipe("--frames 3"))?;
    let pid = format!("pid {}", std::process::id());
    failed(&run, &[&card.display().to_string(), &pid, "drives"], &before)?;
    note(run.stderr.trim());
    drop(held);
    works_again()
}

fn no_such_device() -> anyhow::Result<Outcome> {
    fails(&mut dmaflow("pipe --from nosuch --to vkms --frames 1"), &["nosuch", "/dev/video0 (vivid)"])?;
    fails(&mut dmaflow("pipe --from /dev/video99 --to vkms --frames 1"), &["/dev/video99", "No such file"])?;
    fails(&mut dmaflow("pipe --from vivid --to nosuch --frames 1"), &["nosuch", "(vkms)"])?;
    fails(&mut dmaflow("pipe --from vivid --to /dev/dri/card99 --frames 1"), &["/dev/dri/card99", "No such file"])?;
    fails(&mut dmaflow("snap nosuch /tmp/x.png"), &["nosuch"])?;
    fails(&mut dmaflow("snap /dev/dri/card99 /tmp/x.png"), &["/dev/dri/card99"])?;
    ensure!(fs::metadata("/tmp/x.png").is_err(), "a picture of nothing");
    PASSED
}

fn not_a_capture_device() -> anyhow::Result<Outcome> {
    // A capture node, an output node and a radio.
    vivid(&["node_types=0x111"])?;
    let outputs: Vec<_> = fs::read_dir("/dev")?
        .flatten()
        .map(|entry| entry.path().display().to_string())
        .filter(|path| path.starts_with("/dev/radio") || (path.starts_with("/dev/video") && path != "/dev/video0"))
        .collect();
    ensure!(outputs.len() >= 2, "vivid made only {outputs:?} beside /dev/video0");
    for node in &outputs {
        fails(
            &mut dmaflow(&format!("pipe --from {node} --to vkms --frames 1")),
            &[node, "not a video capture device"],
        )?;
    }
    // Their driver's name leads to the node that does capture.
    works_again()?;
    fails(&mut dmaflow("pipe --from /dev/null --to vkms --frames 1"), &["/dev/null", "not a V4L2 device"])?;
    fails(&mut dmaflow("pipe --from vivid --to /dev/null --frames 1"), &["/dev/null", "not a DRM device"])?;
    let vgem = fs::read_dir("/dev/dri")?.flatten().map(|entry| entry.path());
    let vgem = vgem
        .filter(|path| path.to_string_lossy().contains("card"))
        .find(|path| Some(path) != modules::card().ok().as_ref());
    if let Some(vgem) = vgem {
        let vgem = vgem.display().to_string();
        fails(&mut dmaflow(&format!("pipe --from vivid --to {vgem} --frames 1")), &[&vgem])?;
    }
    PASSED
}

fn no_permission() -> anyhow::Result<Outcome> {
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let card = modules::card()?.display().to_string();
    let both = [("vivid", "vkms"), ("/dev/video0", "vkms"), ("vivid", card.as_str())];
    for (from, to) in both {
        let line = fails(
            &mut as_nobody(&format!("{program} pipe --from {from} --to {to} --frames 1")),
            &["/dev/", "Permission denied"],
        )?;
        ensure!(line.contains("group"), "no advice: {line}");
    }
    // The display alone is allowed, then the camera is what is named.
    let camera = as_nobody(&format!("{program} pipe --from vivid --to null --frames 1")).output()?;
    let line = String::from_utf8_lossy(&camera.stderr).into_owned();
    ensure!(camera.status.code() == Some(1) && line.contains("/dev/video0") && line.contains("Permission"), "{line}");
    PASSED
}

fn what_the_camera_lacks() -> anyhow::Result<Outcome> {
    let base = "pipe --from vivid --to vkms --frames 1";
    fails(&mut dmaflow(&format!("{base} --format P010")), &["no P010", "it offers", "XR24"])?;
    let size =
        fails(&mut dmaflow(&format!("{base} --format XR24 --size 641x361")), &["no 641x361", "nearest", "640x360"])?;
    note(&size);
    let rate = fails(
        &mut dmaflow(&format!("{base} --format XR24 --size 640x360 --fps 1000")),
        &["no 1000 frames", "nearest", "60"],
    )?;
    note(&rate);
    fails(&mut dmaflow(&format!("{base} --input 9")), &["input", "HDMI"])?;
    fails(&mut dmaflow(&format!("{base} --control nosuch=1")), &["nosuch", "/dev/video0"])?;
    fails(&mut dmaflow(&format!("{base} --control wrap_timestamp=9")), &["wrap_timestamp", "0 to 2"])?;
    works_again()
}

/// The connector is forced off, and back to what it finds even if the test fails.
struct Unplugged(std::path::PathBuf);

impl Drop for Unplugged {
    fn drop(&mut self) {
        let _ = fs::write(&self.0, "detect");
    }
}

fn nothing_connected() -> anyhow::Result<Outcome> {
    let connector = Unplugged(modules::connector()?);
    fs::write(&connector.0, "off")?;
    ensure!(fs::read_to_string(&connector.0)?.trim() == "disconnected", "the connector cannot be forced off");
    // The console may react to the unplugging; its answer is not the command's doing.
    std::thread::sleep(std::time::Duration::from_millis(300));
    fails(&mut pipe("--frames 1"), &["/dev/dri/card", "nothing is connected", "Virtual-1"])?;
    drop(connector);
    std::thread::sleep(std::time::Duration::from_millis(300));
    works_again()
}

fn larger_than_every_mode() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let run = finish(&mut dmaflow("pipe --from pattern --to vkms --format XR24 --size 8000x64 --frames 1"))?;
    run.one_line(1, &["8000x64", "4096x2160"])?;
    before.is_back()?;
    drop(witness);
    PASSED
}

fn frames_0() -> anyhow::Result<Outcome> {
    fails(&mut pipe("--frames 0"), &["--frames", "0"])?;
    PASSED
}

fn stdout_that_cannot_be_written() -> anyhow::Result<Outcome> {
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let shell = |line: String| {
        let mut command = Command::new("bash");
        command.args(["-c", &line]);
        command
    };
    let pipe = format!("{program} pipe --from vivid --to vkms --format XR24 --frames 3 --json");
    for line in [format!("{pipe} >&-"), format!("{pipe} >/dev/full"), format!("{pipe} | :; exit ${{PIPESTATUS[0]}}")] {
        note(&fails(&mut shell(line), &["stdout"])?);
    }
    for line in [format!("{program} list >&-"), format!("{program} list >/dev/full")] {
        fails(&mut shell(line), &["stdout"])?;
    }
    // A result that goes nowhere on purpose is no failure.
    let run = finish(&mut shell(format!("{pipe} >/dev/null")))?;
    run.has_status(0)?;
    // A closed stderr or stdin takes nothing away.
    let run = finish(&mut shell(format!("{pipe} 2>&- <&-")))?;
    run.json(0)?;
    PASSED
}

fn few_descriptors() -> anyhow::Result<Outcome> {
    let program = dmaflow("").get_program().to_string_lossy().into_owned();
    let limited = |options: &str| {
        let mut command = Command::new("bash");
        let pipe = format!("{program} pipe --from vivid --to vkms --format XR24 --size 640x360 --frames 3 --json");
        command.args(["-c", &format!("ulimit -n 12; exec {pipe} {options}")]);
        command
    };
    note(&fails(&mut limited("--buffers 12"), &["Too many open files", "ulimit -n", "fewer buffers"])?);
    let witness = Witness::new()?;
    let before = State::read();
    let run = finish(&mut limited(""))?;
    before.is_back()?;
    drop(witness);
    match run.status.code() {
        Some(0) => {
            note(&format!("with its default the limit is enough: {} buffers", number(&run.json(0)?, "buffers")?))
        }
        _ => note(run.one_line(1, &["Too many open files"])?),
    }
    PASSED
}

fn camera_in_use() -> anyhow::Result<Outcome> {
    let before = State::read();
    let mut first = start(&mut dmaflow("pipe --from vivid --to null --format XR24"))?;
    first.wait_until("to hold dma-bufs", |_| !before.new_dma_bufs().is_empty())?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    let run = finish(&mut pipe("--format XR24 --frames 1"))?;
    note(run.one_line(1, &["/dev/video0", "busy"])?);
    first.signal(nix::sys::signal::Signal::SIGTERM)?;
    first.end()?.has_status(0)?;
    works_again()
}
