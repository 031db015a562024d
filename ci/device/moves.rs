//! What happens while frames flow: the source changes, signals and displays go and come, imports are refused for a while.

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

use crate::camera::format;
use crate::harness::{Outcome, PASSED, Test, note};
use crate::ladder::text;
use crate::modules::{Witness, control, debugfs};
use crate::process::{State, number, pipe, sh, start};

const NEEDS: &[&str] = &["vivid", "vkms"];
const TERMINAL: &[&str] = &["vivid", "vkms", "script"];

pub const TESTS: &[Test] = &[
    Test { name: "moves::the_source_changes", needs: NEEDS, seconds: 240, run: the_source_changes },
    Test { name: "moves::verified_over_changes", needs: NEEDS, seconds: 240, run: changes_verified },
    Test { name: "moves::the_wrong_frame_after_a_change", needs: NEEDS, seconds: 240, run: wrong_after_a_change },
    Test { name: "moves::told_on_a_terminal", needs: TERMINAL, seconds: 60, run: a_move_on_a_terminal },
    Test { name: "moves::no_signal_for_a_while", needs: NEEDS, seconds: 120, run: no_signal },
    Test { name: "moves::unplugged_and_back", needs: NEEDS, seconds: 120, run: unplugged },
    Test { name: "moves::down_and_up_again", needs: &["vkms", "udmabuf"], seconds: 120, run: down_and_up },
];

/// The CRC that vkms reports for a mode with nothing on it: rows of opaque black, 16 bits for each of alpha, red, green and blue.
fn black(width: usize, height: usize) -> u32 {
    let row = [0xff, 0xff, 0, 0, 0, 0, 0, 0].repeat(width);
    // The kernel's crc32_le begins with 0 and inverts nothing.
    let mut hasher = crc32fast::Hasher::new_with_initial(u32::MAX);
    (0..height).for_each(|_| hasher.update(&row));
    !hasher.finalize()
}

/// The CRCs that vkms has reported and that nobody has read.
pub fn crcs(data: &mut fs::File) -> Vec<u32> {
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
pub fn digital_video(timings: u32) -> Result<()> {
    sh("v4l2-ctl -d /dev/video0 -i 3")?;
    control(&format!("dv_timings={timings}"))?;
    control("dv_timings_signal_mode=4")?;
    sh("v4l2-ctl -d /dev/video0 --set-dv-bt-timings query").map(drop)
}

pub fn as_it_was() -> Result<()> {
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
    // At most one copy a change, to keep the picture, and none besides. None where a change comes before a picture of the one before.
    let copies = result["copies"].as_array().context("copies")?;
    let kept = number(&copies[0], "count")? as usize;
    ensure!(
        copies.len() == 1 && (moves.len() / 2..=moves.len() + 1).contains(&kept),
        "{} moves, {copies:?}",
        moves.len()
    );
    before.is_back()?;
    as_it_was()?;
    drop(witness);
    PASSED
}

/// Every picture shown is right, those before a change and those after it.
fn changes_verified() -> anyhow::Result<Outcome> {
    digital_video(7)?;
    let mut running = start(&mut pipe("--format XR24 --verify"))?;
    running.wait_until_it_shows()?;
    for timings in [0, 4, 7, 0] {
        control(&format!("dv_timings={timings}"))?;
        std::thread::sleep(Duration::from_millis(2500));
        ensure!(running.runs(), "it ended with timings {timings}");
    }
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    let (checked, wrong) = (number(&result, "verify/checked")?, number(&result, "verify/wrong")?);
    let moves = result["moves"].as_array().context("moves")?.len();
    note(&format!("{checked} pictures checked, {wrong} wrong, {moves} moves"));
    ensure!(wrong == 0 && checked > 20 && checked == number(&result, "frames/presented")?, "{result}");
    ensure!(moves >= 3, "{moves} moves: {result}");
    as_it_was()?;
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

/// The kernel leaves an unplugged display's controller on until somebody turns it off: frames go on, and are there when it is back. That
/// nobody saw them is said, when it began and when it ended.
fn unplugged() -> anyhow::Result<Outcome> {
    let status = crate::modules::connector()?;
    let mut running = start(&mut pipe("--format XR24 --size 640x360"))?;
    running.wait_until_it_shows()?;
    for state in ["off", "detect", "off", "on"] {
        fs::write(&status, state)?;
        // A look each second, and a slow machine.
        std::thread::sleep(Duration::from_millis(2500));
        ensure!(running.runs(), "it ended when the display was set to {state}");
    }
    fs::write(&status, "detect")?;
    running.signal(nix::sys::signal::Signal::SIGINT)?;
    let result = running.end()?.json(0)?;
    let (captured, presented) = (number(&result, "frames/captured")?, number(&result, "frames/presented")?);
    ensure!(captured == presented && captured > 20, "{result}");
    let moves = result["moves"].as_array().context("moves")?;
    let told: Vec<_> = moves.iter().map(|step| text(step, "why")).collect::<Result<_>>()?;
    let (off, on) = ("Virtual-1 was unplugged", "Virtual-1 is plugged in again");
    ensure!(told.len() == 4, "{moves:?}");
    for (why, start) in told.iter().zip([off, on, off, on]) {
        ensure!(why.starts_with(start), "{why:?} instead of {start:?}: {moves:?}");
    }
    let frames: Vec<_> = moves.iter().map(|step| number(step, "frame")).collect::<Result<_>>()?;
    ensure!(frames.is_sorted() && frames[0] > 0 && frames[3] <= captured, "{moves:?}");
    ensure!(moves.iter().all(|step| step["from"] == "exported" && step["to"] == "exported"), "{moves:?}");
    PASSED
}

/// Frames are counted as they are captured, also where some of them are never shown, and on after a change.
fn wrong_after_a_change() -> anyhow::Result<Outcome> {
    for place in 30..36 {
        digital_video(0)?;
        let options = format!("--format XR24 --present mailbox --verify --frames 50 --corrupt-frame {place}");
        let mut running = start(&mut pipe(&options))?;
        running.wait_until_it_shows()?;
        control("dv_timings=4")?;
        let run = running.end()?;
        // In mailbox the changed frame may be one of those that are never shown.
        if run.status.code() == Some(0) {
            continue;
        }
        let result = run.json(4)?;
        ensure!(result["moves"].as_array().is_some_and(|moves| moves.len() == 1), "{result}");
        ensure!(number(&result, "verify/first_wrong/frame")? == place, "frame {place} was changed: {result}");
        ensure!(number(&result, "verify/wrong")? == 1, "{result}");
        let dropped = number(&result, "frames/dropped_by_display")?;
        note(&format!("frame {place} was found, {dropped} were never shown"));
        as_it_was()?;
        return PASSED;
    }
    anyhow::bail!("none of the changed frames was shown")
}

/// What happens is told when it does, above the live line.
fn a_move_on_a_terminal() -> anyhow::Result<Outcome> {
    let witness = Witness::new()?;
    digital_video(7)?;
    let before = State::read();
    let program = pipe("").get_program().to_string_lossy().into_owned();
    let line = format!("stty cols 200; {program} pipe --from vivid --to vkms --format XR24 --frames 150; echo =$?=");
    let mut running = start(std::process::Command::new("script").args(["-qc", &line, "/dev/null"]))?;
    running.wait_until_it_shows()?;
    control("dv_timings=0")?;
    let run = running.end()?;
    before.is_back()?;
    ensure!(run.stdout.contains("=0="), "it did not end in order: {:?}", run.stdout);
    let (live, table) = run
        .stdout
        .split_once("from     ")
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
