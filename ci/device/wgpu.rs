//! examples/wgpu_texture: dmaflow's images on a device of wgpu's. `ci/test` builds it beside these tests.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::gpu::has_turned_bars;
use crate::harness::{Outcome, PASSED, Test};
use crate::process::finish;

const NEEDS: &[&str] = &["vivid", "udmabuf", "vulkaninfo"];

pub const TESTS: &[Test] = &[Test { name: "wgpu::a_texture", needs: NEEDS, seconds: 300, run: a_texture }];

/// What the validation layer says of every view of an imported image, wrongly with lavapipe: see `src/vulkan/messages.rs`.
const NO_FEATURES: &str = "VUID-VkImageViewCreateInfo-None-02273";

/// The example, watched by the validation layer, which the loader puts under it and which then writes to stdout.
fn example() -> Result<Command> {
    let tests = std::env::current_exe()?;
    let program = tests
        .ancestors()
        .nth(2)
        .context("the tests are in no folder")?
        .join("wgpu_texture");
    ensure!(program.is_file(), "{} is not there: ci/test builds it", program.display());
    let mut command = Command::new(program);
    command
        .env("VK_INSTANCE_LAYERS", "VK_LAYER_KHRONOS_validation")
        .env("VK_KHRONOS_VALIDATION_VALIDATE_SYNC", "1")
        .env("VK_KHRONOS_VALIDATION_REPORT_FLAGS", "error,warn,perf,info");
    Ok(command)
}

/// Ten frames in four buffers: each is imported once, drawn from by wgpu, and goes back to the camera.
fn a_texture() -> anyhow::Result<Outcome> {
    let file = std::env::temp_dir().join(format!("wgpu.{}.png", std::process::id()));
    let run = finish(example()?.arg("vivid").arg(&file))?;
    run.has_status(0)?;
    ensure!(run.stderr == "10 frames, 4 imports\n", "{}", run.stderr);
    // The layer is there, and looks at synchronization too.
    ensure!(run.stdout.contains("VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION"), "{}", run.stdout);
    let said = run.stdout.lines().find(|line| {
        line.starts_with("Validation ") && !line.starts_with("Validation Info") && !line.contains(NO_FEATURES)
    });
    ensure!(said.is_none(), "the validation layer said: {}", run.stdout);
    has_turned_bars(&file)?;
    PASSED
}
