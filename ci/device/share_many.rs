//! One camera at eight consumers at once, each a process of its own: a display, a GPU, a picture in a file, and programs that look at each
//! frame.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dmaflow::endpoint::Source;
use dmaflow::error::Kind;
use dmaflow::share::{Receiver, ServerRequest};
use dmaflow::sink::frame_to_rgb;
use dmaflow::v4l2::{CameraRequest, RateRequest};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::camera::request;
use crate::gpu::{LAVAPIPE, tested};
use crate::harness::{Outcome, PASSED, Test, long, note};
use crate::process::{Run, Running, dmaflow, finish, number, start};
use crate::shared::{Flow, Shared, is_in_time, sum};
use crate::sinks::read_png;

const EIGHT: &str = "share::eight_consumers";

pub const TESTS: &[Test] = &[
    Test { name: EIGHT, needs: &["vivid", "vkms", "udmabuf", "vulkaninfo"], seconds: 400, run: eight_consumers },
    Test {
        name: "share::taken_back_from_a_gpu",
        needs: &["vivid", "udmabuf", "vulkaninfo"],
        seconds: 180,
        run: taken_back_from_a_gpu,
    },
    Test {
        name: "share::a_gpu_that_writes",
        needs: &["vivid", "udmabuf", "vulkaninfo"],
        seconds: 120,
        run: a_gpu_that_writes,
    },
];

/// For the process of a consumer: where its camera is.
pub const CONSUMER: &str = "DMAFLOW_TEST_CONSUMER";

/// So many processes look at each frame themselves.
const LOOKERS: usize = 4;
/// The smallest picture of vivid's webcam at the highest of its rates that one emulated processor holds with the eight: composing the
/// display's picture and reading one by lavapipe take it some 30 ms and 100 ms, in which vivid, which keeps time by the clock, may come too
/// late for its next frame.
const SIZE: (u32, u32) = (320, 180);
const RATE: f64 = 10.0;
/// A display that shows every frame keeps four.
const BUDGET: u32 = 4;
const TRIES: u32 = 3;

/// No picture is copied, each consumer sees each frame that it gets as it was captured, and the camera loses none, whoever is late.
fn eight_consumers() -> Result<Outcome> {
    if let Ok(at) = std::env::var(CONSUMER) {
        return look(&at);
    }
    let frames = if long() { 1200 } else { 100 };
    let mut late = Vec::new();
    for _ in 0..TRIES {
        let flow = once(frames)?;
        ensure!(flow.had_buffers(), "the camera had no buffer: {flow}");
        if flow.late == 0 {
            return PASSED;
        }
        late.push(flow.late);
    }
    // It had a buffer each time: on a host that stalls now and then vivid itself comes too late for some.
    ensure!(late.iter().all(|&late| is_in_time(late, frames)), "lost in {TRIES} tries of {frames} frames: {late:?}");
    PASSED
}

/// A consumer that looks at each frame that it gets, and says what it saw.
fn look(at: &str) -> Result<Outcome> {
    let mut receiver = Receiver::connect(at, "looker")?;
    let (mut seen, mut revoked) = (Vec::new(), 0);
    loop {
        match receiver.next_within(Duration::from_secs(100)) {
            Ok(frame) => {
                let frame = frame.context("no frame came")?;
                let sum = sum(&frame)?;
                match frame.check() {
                    Ok(()) => seen.push(json!([frame.meta().timestamp.us, sum])),
                    Err(_) => revoked += 1,
                }
            }
            Err(error) if error.kind() == Kind::Ended => break,
            Err(error) => return Err(error.into()),
        }
    }
    let copied: u64 = receiver.copies().iter().map(|copies| copies.bytes).sum();
    let skipped = receiver.skipped();
    note(&json!({"seen": seen, "revoked": revoked, "skipped": skipped, "bytes_copied": copied}).to_string());
    PASSED
}

fn once(frames: u64) -> Result<Flow> {
    let (at, file) = ("/tmp/dmaflow-share-eight.sock", "/tmp/dmaflow-share-eight.png");
    // Lavapipe maps what it imports for writing.
    let server = ServerRequest { budget: BUDGET, writable: true, ..ServerRequest::default() };
    let rate = RateRequest::Exactly(RATE);
    let mut shared = Shared::new(at, server, &CameraRequest { rate, buffers: Some(8), ..request("XR24", SIZE) })?;
    let mut running = Vec::new();
    // One after the other: they are slow to start on one processor, and the first is not to wait for all the others.
    let mut begin = |command: &mut Command| -> Result<()> {
        running.push(start(command)?);
        shared.wait_for(running.len())
    };
    let pipe = |options: &str| dmaflow(&format!("pipe --from unix:{at} --json {options}"));
    begin(&mut pipe(&format!("--to vulkan:{} --path zero-copy --verify", tested())))?;
    begin(&mut pipe("--to vkms --path zero-copy --verify"))?;
    begin(&mut pipe("--to null --path zero-copy"))?;
    begin(&mut pipe(&format!("--to png:{file}")))?;
    for _ in 0..LOOKERS {
        let mut looker = Command::new(std::env::current_exe()?);
        begin(looker.args(["--run-one", EIGHT]).env(CONSUMER, at))?;
    }
    // By their times: on a host that stalls vivid gives two frames one number now and then.
    let (mut sums, mut last, mut captured) = (BTreeMap::new(), Vec::new(), 0);
    let flow = shared.flow(frames, |frame| {
        let before = sums.insert(frame.meta().timestamp.us, sum(frame)?);
        ensure!(before.is_none(), "two frames of {} µs", frame.meta().timestamp.us);
        captured += 1;
        if captured == frames {
            last = frame_to_rgb(frame)?;
        }
        Ok(true)
    })?;
    let time = sums
        .last_key_value()
        .zip(sums.first_key_value())
        .map(|(last, first)| last.0 - first.0);
    let held = (frames - 1) as f64 * 1e6 / time.context("no frame came")? as f64;
    let stolen: Vec<_> = shared.end()?.iter().map(|consumer| consumer.stolen).collect();
    let runs: Vec<Run> = running.into_iter().map(Running::end).collect::<Result<_>>()?;
    let results = runs.iter().map(|run| run.json(0)).collect::<Result<Vec<_>>>()?;
    let mut got = Vec::new();
    for result in &results[..4] {
        got.push(number(result, "frames/captured")?);
        is_right(result).with_context(|| result.to_string())?;
    }
    for (result, &stolen) in results.iter().zip(&stolen).skip(4) {
        let seen = result["seen"].as_array().context("what was seen")?;
        for one in seen {
            let time = one[0].as_u64().context("a time")?;
            let captured = sums.get(&time).context("a frame that was not captured")?;
            ensure!(one[1] == *captured, "frame of {time} µs: {} seen, {captured} captured", one[1]);
        }
        let count = |what: &str| number(result, what).with_context(|| format!("{what} of who looks"));
        let (revoked, skipped) = (count("revoked")?, count("skipped")?);
        // Nothing that the camera gave is unaccounted for, and nobody is told of a loss that was none.
        let all = seen.len() as u64 + revoked + skipped;
        ensure!(all == frames, "{} seen, {revoked} taken back and {skipped} skipped of {frames}", seen.len());
        ensure!(revoked <= stolen, "{revoked} reported as taken back, and {stolen} were");
        ensure!(count("bytes_copied")? == 0, "{} bytes copied by who looks", result["bytes_copied"]);
        got.push(seen.len() as u64);
    }
    ensure!(read_png(file.as_ref())? == (SIZE, last), "the picture in the file is not the last");
    fs::remove_file(file)?;
    // Those that are quick get all: they would have to be four frames late to miss one, which is the host's doing as when vivid is late.
    ensure!(got[2..].iter().all(|&got| is_in_time(frames - got, got)), "{got:?} of {frames}");
    note(&format!(
        "{}x{} at {RATE} fps, of which {held:.2} were held: {flow}; vulkan, vkms, null, png and {LOOKERS} that look got \
         {got:?}, of which taken back {stolen:?}",
        SIZE.0, SIZE.1
    ));
    Ok(flow)
}

/// Nothing was copied on the way, and all that was compared was right.
fn is_right(result: &Value) -> Result<()> {
    let copied = number(result, "bytes_copied")?;
    if result["sink"].as_str().is_some_and(|sink| sink.starts_with("png:")) {
        // The one that goes into the file, when all is over.
        ensure!(copied == u64::from(SIZE.0 * SIZE.1 * 4) && result["copies"][0]["count"] == 1, "copies");
        return Ok(());
    }
    ensure!(result["path"] == "exported" && copied == 0, "copies");
    if result["sink"] != "null" {
        let checked = number(result, "verify/checked")?;
        ensure!(checked == number(result, "frames/presented")? && number(result, "verify/wrong")? == 0, "wrong frames");
        // Both may be slower than the camera: vkms of 7.2 composes beside the others for longer than a frame's time, and a GPU in software
        // first compiles its shader, which can take it most of the time that there is. What a display has given back comes to it again.
        let gpu = result["sink"].as_str().is_some_and(|sink| sink.starts_with("vulkan"));
        let least = if gpu { 1 } else { u64::from(BUDGET) + 1 };
        ensure!(checked >= least, "{checked} frames were checked");
    }
    Ok(())
}

/// A GPU that is late has frames taken back while it reads them: they count as dropped, and not as wrong.
fn taken_back_from_a_gpu() -> Result<Outcome> {
    let at = "/tmp/dmaflow-share-late.sock";
    // So few buffers that the camera is short as soon as two frames are out, and any lease is over at once.
    let options = "--from vivid --format XR24 --size 320x180 --fps 30 --buffers 3 --budget 2 --lease 1 --writable";
    let server = start(&mut dmaflow(&format!("share {options} --at {at} --json")))?;
    let mut keeper = crate::share::connect(at)?;
    let mut gpu = start(&mut dmaflow(&format!(
        "pipe --from unix:{at} --to vulkan:{} --path zero-copy --verify --seconds 6 --json",
        tested()
    )))?;
    let mut kept = std::collections::VecDeque::new();
    while gpu.runs() {
        kept.extend(keeper.next_within(Duration::from_millis(50))?);
        if kept.len() > 1 {
            kept.pop_front();
        }
    }
    let result = gpu.end()?.json(0)?;
    server.signal(Signal::SIGINT)?;
    server.end()?.json(0)?;
    let (checked, dropped) = (number(&result, "verify/checked")?, number(&result, "frames/dropped_by_display")?);
    ensure!(number(&result, "verify/wrong")? == 0 && dropped > 0, "{result}");
    ensure!(checked + dropped == number(&result, "frames/captured")?, "{result}");
    note(&format!("{checked} frames were read in time, and {dropped} taken back"));
    PASSED
}

/// A driver that maps what it imports for writing refuses what is shared for reading alone, and what it is told to do about that helps.
fn a_gpu_that_writes() -> Result<Outcome> {
    let at = "/tmp/dmaflow-share-reading-gpu.sock";
    let repair = "share --writable";
    for writable in ["", " --writable"] {
        let server = start(&mut dmaflow(&format!(
            "share --from vivid --format XR24 --size 320x180 --fps 30 --at {at} --json{writable}"
        )))?;
        drop(crate::share::connect(at)?);
        let line = format!("pipe --from unix:{at} --to vulkan:{LAVAPIPE} --path zero-copy --verify --frames 5 --json");
        let run = finish(&mut dmaflow(&line))?;
        if writable.is_empty() {
            // Zero copy was asked for, and is refused.
            run.has_status(3)?;
            ensure!(run.stderr.contains("read-only") && run.stderr.contains(repair), "{}", run.stderr);
            note(run.stderr.trim());
        } else {
            let result = run.json(0)?;
            ensure!(result["path"] == "exported" && number(&result, "bytes_copied")? == 0, "{result}");
            ensure!(number(&result, "verify/checked")? == 5 && number(&result, "verify/wrong")? == 0, "{result}");
        }
        server.signal(Signal::SIGINT)?;
        server.end()?.json(0)?;
    }
    PASSED
}
