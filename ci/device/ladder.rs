//! The ladder: the first rung that holds, why those above it do not, every copy accounted for, and steps while frames flow.

use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::{Ready, Refusal, Rung, Sink, Source, SourceCounts};
use dmaflow::format::Layout;
use dmaflow::frame::{Buffer, Frame};
use dmaflow::kms::{Display, DisplayRequest};
use dmaflow::ladder::Path;
use dmaflow::memory::Allocator;
use dmaflow::pattern::{Pattern, PatternRequest};
use dmaflow::pipe::{Limits, Pipe};
use nix::libc;
use serde_json::Value;

use crate::camera::format;
use crate::capture::Shattered;
use crate::formats::shown_of_captured;
use crate::harness::{Outcome, PASSED, Test, long, note};
use crate::modules::{Witness, control, debugfs, kernel, vivid};
use crate::process::{State, finish, number, pipe, sh, start};

const NEEDS: &[&str] = &["vivid", "vkms"];
/// How many make buffers for a display: itself, its GBM, a heap and udmabuf.
pub const MAKERS: usize = if cfg!(feature = "gbm") { 4 } else { 3 };
const TERMINAL: &[&str] = &["vivid", "vkms", "script"];

pub const TESTS: &[Test] = &[
    Test { name: "ladder::yuyv_is_copied", needs: NEEDS, seconds: 900, run: yuyv_is_copied },
    Test { name: "ladder::nv12_where_it_can", needs: NEEDS, seconds: 300, run: nv12_where_it_can },
    Test { name: "ladder::every_format_that_is_converted", needs: NEEDS, seconds: 400, run: every_format },
    Test { name: "ladder::strides_by_the_displays_memory", needs: NEEDS, seconds: 120, run: strides },
    Test { name: "ladder::a_device_that_needs_contiguous_memory", needs: NEEDS, seconds: 120, run: contiguous },
    Test { name: "ladder::a_copy_on_demand", needs: NEEDS, seconds: 120, run: a_copy_on_demand },
    Test { name: "ladder::a_wrong_copy_is_found", needs: NEEDS, seconds: 120, run: a_wrong_copy },
    Test { name: "ladder::the_source_changes", needs: NEEDS, seconds: 240, run: the_source_changes },
    Test { name: "ladder::a_move_on_a_terminal", needs: TERMINAL, seconds: 60, run: a_move_on_a_terminal },
    Test { name: "ladder::no_signal_for_a_while", needs: NEEDS, seconds: 120, run: no_signal },
    Test { name: "ladder::unplugged_and_back", needs: NEEDS, seconds: 120, run: unplugged },
    Test { name: "ladder::down_and_up_again", needs: &["vkms", "udmabuf"], seconds: 120, run: down_and_up },
];

fn text<'a>(value: &'a Value, what: &str) -> Result<&'a str> {
    value[what].as_str().with_context(|| format!("no {what} in {value}"))
}

/// The refusal of a rung; each has a step, a reason and a repair.
fn refusal<'a>(result: &'a Value, rung: &str) -> Result<&'a Value> {
    let all = result["refusals"].as_array().context("refusals")?;
    for refusal in all {
        for what in ["step", "why", "repair"] {
            ensure!(!text(refusal, what)?.is_empty(), "no {what} in {refusal}");
        }
    }
    all.iter()
        .find(|refusal| refusal["rung"] == rung)
        .with_context(|| format!("no refusal of {rung} in {result}"))
}

/// A run in which each frame is copied once, converted to 4 bytes a pixel.
fn converted_once(result: &Value, frames: u64, (width, height): (u64, u64)) -> Result<()> {
    ensure!(result["path"] == "copied", "the path is {}", result["path"]);
    let copies = result["copies"].as_array().context("copies")?;
    ensure!(copies.len() == 1 && number(&copies[0], "count")? == frames, "{copies:?}");
    let bytes = frames * width * height * 4;
    for (what, expected) in [
        ("bytes_copied", bytes),
        ("frames/captured", frames),
        ("frames/presented", frames),
        ("verify/checked", frames),
        ("verify/wrong", 0),
    ] {
        ensure!(number(result, what)? == expected, "{what} is not {expected}: {result}");
    }
    Ok(())
}

fn yuyv_is_copied() -> anyhow::Result<Outcome> {
    let frames = if long() { 120 } else { 12 };
    let options = format!("--format YUYV --size 640x360 --frames {frames} --verify");
    let result = finish(&mut pipe(&options))?.json(0)?;
    converted_once(&result, frames, (640, 360))?;
    for rung in ["exported", "reverse"] {
        let refusal = refusal(&result, rung)?;
        ensure!(text(refusal, "why")?.contains("YUYV") && text(refusal, "repair")?.contains("XR24"), "{refusal}");
    }
    refusal(&result, "converted")?;
    let run = finish(&mut pipe(&format!("{options} --path zero-copy")))?;
    run.one_line(3, &["zero copy", "exported", "YUYV", "XR24"])?;
    let result = run.json(3)?;
    ensure!(text(refusal(&result, "exported")?, "why")?.contains("YUYV"), "{result}");
    ensure!(result.get("frames").is_none(), "numbers that were not measured: {result}");
    PASSED
}

fn nv12_where_it_can() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format NV12 --size 640x360 --frames 4 --verify"))?.json(0)?;
    if kernel() >= (7, 0) {
        ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
        shown_of_captured(&result, 4, 4)?;
    } else {
        converted_once(&result, 4, (640, 360))?;
        ensure!(text(refusal(&result, "exported")?, "why")?.contains("NV12"), "{result}");
    }
    PASSED
}

fn every_format() -> anyhow::Result<Outcome> {
    let mut tried = 0;
    for code in ["YUYV", "UYVY", "NV12", "NV21", "YU12", "GREY", "RGB3", "BGR3"] {
        let run = finish(&mut pipe(&format!("--format {code} --size 320x180 --frames 2 --verify")))?;
        let result = run.json(0).with_context(|| code.to_owned())?;
        ensure!(number(&result, "verify/wrong")? == 0 && number(&result, "verify/checked")? == 2, "{code}: {result}");
        if result["path"] == "copied" {
            converted_once(&result, 2, (320, 180)).with_context(|| code.to_owned())?;
            tried += 1;
        }
    }
    note(&format!("{tried} of 8 formats were converted"));
    ensure!(tried >= 3, "only {tried} formats were converted");
    PASSED
}

fn strides() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    for parameters in [&["multiplanar=1"], &["multiplanar=2"]] {
        vivid(parameters)?;
        let options = "--format XR24 --size 640x360 --stride 2624 --stride-align 256 --frames 8 --verify";
        let result = finish(&mut pipe(options))?.json(0)?;
        ensure!(result["path"] == "reverse" && number(&result, "bytes_copied")? == 0, "{result}");
        ensure!(number(&result, "verify/checked")? == 8 && number(&result, "verify/wrong")? == 0, "{result}");
        ensure!(number(&result, "imports")? == number(&result, "buffers")?, "{result}");
        ensure!(result["stride"][0] == 2560, "the rows are of {} bytes", result["stride"]);
        ensure!(text(refusal(&result, "exported")?, "why")?.contains("2624"), "{result}");
    }
    crate::modules::reload()?;
    before.is_back()?;
    drop(witness);
    PASSED
}

fn contiguous() -> anyhow::Result<Outcome> {
    vivid(&["allocators=1"])?;
    let _shattered = Shattered::new()?;
    let options = "--format XR24 --size 640x360 --stride 2624 --stride-align 256 --frames 6 --verify";
    let result = finish(&mut pipe(options))?.json(0)?;
    ensure!(number(&result, "bytes_copied")? == 0 && number(&result, "verify/wrong")? == 0, "{result}");
    ensure!(result["stride"][0] == 2560, "{result}");
    let refusals = result["refusals"].as_array().context("refusals")?;
    let reverse: Vec<_> = refusals.iter().filter(|refusal| refusal["rung"] == "reverse").collect();
    for refusal in &reverse {
        ensure!(refusal["errno"] == "EFAULT" && refusal["step"] == "VIDIOC_PREPARE_BUF", "{refusal}");
        ensure!(text(refusal, "why")?.contains("contiguous"), "{refusal}");
        ensure!(text(refusal, "repair")?.contains("own buffers"), "{refusal}");
    }
    // The display's own memory, the heap's and udmabuf's were refused, unless one of the first two happened to be contiguous. The cure
    // that is left then is the camera's own memory with other rows.
    let path = text(&result, "path")?;
    note(&format!("{path}, after {} refusals of others' memory", reverse.len()));
    ensure!(path == if reverse.len() == MAKERS { "exported" } else { "reverse" }, "{result}");
    crate::modules::reload()?;
    PASSED
}

fn a_copy_on_demand() -> anyhow::Result<Outcome> {
    let result = finish(&mut pipe("--format XR24 --size 640x360 --frames 6 --verify --path copy"))?.json(0)?;
    converted_once(&result, 6, (640, 360))?;
    ensure!(
        result["copies"][0]["cause"]
            .as_str()
            .is_some_and(|cause| cause.contains("demanded")),
        "{result}"
    );
    PASSED
}

fn a_wrong_copy() -> anyhow::Result<Outcome> {
    let run = finish(&mut pipe("--format YUYV --size 320x180 --frames 5 --verify --corrupt-frame 3"))?;
    let result = run.json(4)?;
    ensure!(number(&result, "verify/first_wrong/frame")? == 3, "{result}");
    PASSED
}

/// The CRC that vkms reports for a mode with nothing on it: rows of opaque black, 16 bits for each of alpha, red, green and blue.
fn black(width: usize, height: usize) -> u32 {
    let row = [0xff, 0xff, 0, 0, 0, 0, 0, 0].repeat(width);
    // The kernel's crc32_le begins with 0 and inverts nothing.
    let mut hasher = crc32fast::Hasher::new_with_initial(u32::MAX);
    (0..height).for_each(|_| hasher.update(&row));
    !hasher.finalize()
}

/// The CRCs that vkms has reported and that nobody has read.
fn crcs(data: &mut fs::File) -> Vec<u32> {
    let mut found = Vec::new();
    let mut line = [0; 128];
    while let Ok(len @ 1..) = data.read(&mut line) {
        let text = String::from_utf8_lossy(&line[..len]).into_owned();
        let crc = text
            .split_whitespace()
            .nth(1)
            .and_then(|word| u32::from_str_radix(word.strip_prefix("0x")?, 16).ok());
        found.extend(crc);
    }
    found
}

/// At the input for digital video, which shows the timings that a control selects: 640x480 (0), 720x576 (4), 1280x720 (7).
fn digital_video(timings: u32) -> Result<()> {
    sh("v4l2-ctl -d /dev/video0 -i 3")?;
    control(&format!("dv_timings={timings}"))?;
    control("dv_timings_signal_mode=4")?;
    sh("v4l2-ctl -d /dev/video0 --set-dv-bt-timings query").map(drop)
}

fn as_it_was() -> Result<()> {
    control("dv_timings_signal_mode=0")?;
    sh("v4l2-ctl -d /dev/video0 -i 0").map(drop)
}

fn the_source_changes() -> anyhow::Result<Outcome> {
    const CHANGES: u32 = 20;
    let witness = Witness::new()?;
    digital_video(7)?;
    let before = State::read();
    let mut running = start(&mut pipe("--format XR24"))?;
    running.wait_until_it_shows()?;
    let folder = debugfs().context("vkms is not in debugfs")?.join("crtc-0/crc");
    fs::write(folder.join("control"), "auto")?;
    let mut data = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(folder.join("data"))?;
    // In whichever mode.
    let modes = fs::read_to_string(crate::modules::connector()?.with_file_name("modes"))?;
    let sizes = modes.lines().filter_map(|line| {
        let (width, height) = line.split_once('x')?;
        Some((width.parse().ok()?, height.parse().ok()?))
    });
    let blacks: std::collections::BTreeSet<_> = sizes
        .filter(|&(width, _)| width <= 1600)
        .map(|(width, height)| black(width, height))
        .collect();
    ensure!(blacks.len() > 4, "vkms has the modes {modes}");
    let (mut seen, mut different) = (0, std::collections::BTreeSet::new());
    for change in 0..CHANGES {
        control(&format!("dv_timings={}", [0, 4, 7][change as usize % 3]))?;
        for _ in 0..12 {
            std::thread::sleep(Duration::from_millis(50));
            let crcs = crcs(&mut data);
            ensure!(crcs.iter().all(|crc| !blacks.contains(crc)), "a black picture after change {change}");
            seen += crcs.len();
            different.extend(crcs);
        }
        ensure!(running.runs(), "it ended at change {change}");
    }
    drop(data);
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    note(&format!("{seen} pictures looked at, {} different", different.len()));
    ensure!(seen > 60 && different.len() > 20, "{seen} pictures, {} different", different.len());
    let moves = result["moves"].as_array().context("moves")?;
    // Two changes in the time of one set-up are one to the source.
    ensure!((10..=CHANGES as usize).contains(&moves.len()), "{} moves: {result}", moves.len());
    ensure!(moves.iter().all(|step| step["to"] == "exported"), "{moves:?}");
    // One copy a change, to keep the picture; none besides.
    let copies = result["copies"].as_array().context("copies")?;
    ensure!(copies.len() == 1 && number(&copies[0], "count")? as usize >= moves.len(), "{copies:?}");
    before.is_back()?;
    as_it_was()?;
    drop(witness);
    PASSED
}

fn no_signal() -> anyhow::Result<Outcome> {
    digital_video(0)?;
    let mut running = start(&mut pipe("--format XR24"))?;
    running.wait_until_it_shows()?;
    // Unplugged, not yet stable, and back with other timings.
    for mode in [1, 2] {
        control(&format!("dv_timings_signal_mode={mode}"))?;
        std::thread::sleep(Duration::from_millis(700));
        ensure!(running.runs(), "it ended without a signal");
        ensure!(crate::modules::screen().contains("allocated by = dmaflow"), "the picture is gone");
    }
    control("dv_timings=4")?;
    control("dv_timings_signal_mode=4")?;
    std::thread::sleep(Duration::from_millis(1500));
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    ensure!(number(&result, "width")? == 720 && number(&result, "height")? == 576, "{result}");
    // And for good: the watchdog's time, then an error that says so.
    let mut running = start(&mut pipe("--format XR24"))?;
    running.wait_until_it_shows()?;
    control("dv_timings_signal_mode=1")?;
    let run = running.end()?;
    run.one_line(1, &["signal", "/dev/video0"])?;
    as_it_was()?;
    PASSED
}

/// The kernel leaves an unplugged display's controller on until somebody turns it off: frames go on, and are there when it is back.
fn unplugged() -> anyhow::Result<Outcome> {
    let status = crate::modules::connector()?;
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    for state in ["off", "detect", "off", "on"] {
        fs::write(&status, state)?;
        std::thread::sleep(Duration::from_millis(600));
        ensure!(running.runs(), "it ended when the display was set to {state}");
    }
    fs::write(&status, "detect")?;
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    let (captured, presented) = (number(&result, "frames/captured")?, number(&result, "frames/presented")?);
    ensure!(captured == presented && captured > 20, "{result}");
    PASSED
}

/// What happens is told when it does, above the live line.
fn a_move_on_a_terminal() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    digital_video(7)?;
    let before = State::read();
    let program = pipe("").get_program().to_string_lossy().into_owned();
    let line = format!(
        "stty cols 200; timeout --foreground --preserve-status -s INT 6 {program} pipe --from vivid --to vkms --format XR24; echo =$?="
    );
    let mut running = start(std::process::Command::new("script").args(["-qc", &line, "/dev/null"]))?;
    running.wait_until_it_shows()?;
    control("dv_timings=0")?;
    let run = running.end()?;
    before.is_back()?;
    ensure!(run.stdout.contains("=0="), "it did not end in order: {:?}", run.stdout);
    let (live, table) = run
        .stdout
        .split_once("\nfrom ")
        .with_context(|| format!("no table in {:?}", run.stdout))?;
    ensure!(live.contains(" fps  exported  "), "no live line: {live:?}");
    let told: Vec<_> = live
        .lines()
        .filter(|line| line.contains("the source changed to XR24"))
        .collect();
    ensure!(!told.is_empty() && told.iter().all(|line| line.contains("exported to exported")), "{live:?}");
    ensure!(table.contains("the source changed to XR24"), "{table}");
    drop(witness);
    PASSED
}

/// Frames of a test card of which some, in the middle, come in memory that no device can import.
struct Mixed {
    shared: Pattern,
    plain: Pattern,
    given: u64,
    hard: std::ops::Range<u64>,
}

impl AsFd for Mixed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.as_fd()
    }
}

impl Source for Mixed {
    fn name(&self) -> &str {
        "mixed"
    }

    fn layout(&self) -> &Layout {
        self.shared.layout()
    }

    fn rate(&self) -> Option<f64> {
        self.shared.rate()
    }

    fn buffers(&self) -> &[Buffer] {
        self.shared.buffers()
    }

    fn start(&mut self) -> dmaflow::Result<()> {
        self.shared.start()?;
        self.plain.start()
    }

    fn try_next(&mut self, ready: Ready) -> dmaflow::Result<Option<Frame>> {
        let (shared, plain) = (self.shared.try_next(ready)?, self.plain.try_next(ready)?);
        let next = if self.hard.contains(&self.given) { plain } else { shared };
        self.given += u64::from(next.is_some());
        Ok(next)
    }

    fn recycle(&mut self) -> dmaflow::Result<()> {
        self.shared.recycle()?;
        self.plain.recycle()
    }

    fn stop(&mut self) -> dmaflow::Result<()> {
        self.shared.stop()?;
        self.plain.stop()
    }

    fn stalled(&self) -> dmaflow::Error {
        self.shared.stalled()
    }

    fn counts(&self) -> SourceCounts {
        self.shared.counts()
    }
}

/// An import that is refused for some frames: copied, none lost; and without a copy again when that is over.
fn down_and_up() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    let before = State::read();
    let card = |allocator| {
        let request = PatternRequest {
            format: Some(format("XR24")),
            size: (320, 180),
            rate: 30.0,
            allocator: Some(allocator),
            ..PatternRequest::default()
        };
        Pattern::new(&request)
    };
    let mixed = || -> dmaflow::Result<Mixed> {
        Ok(Mixed { shared: card(Allocator::Udmabuf)?, plain: card(Allocator::Plain)?, given: 0, hard: 10..90 })
    };
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    // Where copies are not allowed, the first such frame is the end, and the error says that it was refused.
    let mut source = mixed()?;
    let limits = Limits { frames: Some(300), duration: None };
    let ended = Pipe::join(&mut source, &mut display, Path::ZeroCopy, limits)?.run(None, &mut |_| {});
    let error = ended.err().context("went on without copies")?;
    let refusal = std::error::Error::source(&error).and_then(|cause| cause.downcast_ref::<Refusal>());
    let refusal = refusal.with_context(|| format!("refused by nobody: {}", error.line()))?;
    ensure!(refusal.rung == Rung::Exported && refusal.why.contains("plain memory"), "{refusal}");
    display.restore()?;
    drop((source, display));
    before.is_back()?;

    let mut source = mixed()?;
    let mut display = Display::find("vkms", DisplayRequest::default())?;
    let pipe = Pipe::join(&mut source, &mut display, Path::Auto, limits)?;
    ensure!(pipe.rung() == Rung::Exported, "{:?}", pipe.refusals());
    let account = pipe.run(None, &mut |_| {})?;
    let steps: Vec<_> = account.moves.iter().map(|step| (step.frame, step.from, step.to)).collect();
    let (down, up) = ((Rung::Exported, Rung::Copied), (Rung::Copied, Rung::Exported));
    // Down at the first such frame; up a second later, and down again at once; up when it is over.
    ensure!(steps.iter().map(|step| (step.1, step.2)).eq([down, up, down, up]), "{steps:?}");
    ensure!(steps[0].0 == 11 && steps[1].0 == 71 && steps[2].0 == 71 && steps[3].0 == 191, "{steps:?}");
    ensure!(account.rung == Rung::Exported && account.captured == 300 && account.presented == 300, "{account:?}");
    let copied = account.copies.entries().first().map_or(0, |copies| copies.count);
    ensure!(copied == (70 - 10) + (190 - 70), "{copied} copies between {steps:?}");
    // What holds at the end was refused by nobody; the moves say why it did not hold for a while.
    ensure!(account.refusals.is_empty(), "{:?}", account.refusals);
    ensure!(account.moves[0].why.contains("plain memory"), "{:?}", account.moves);
    ensure!(display.imports() == 4, "{} imports", display.imports());
    drop((source, display));
    before.is_back()?;
    drop(witness);
    PASSED
}
