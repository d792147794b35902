// SPDX-License-Identifier: GPL-2.0-only
/*
 * A GPU scheduler without a GPU: /dev/mock_gpu feeds jobs to the kernel's own drivers/gpu/drm/scheduler, so that the
 * gpu_scheduler tracepoints fire for real.
 *
 *   write "N RUN_US"   pushes N jobs, each of which keeps the hardware busy for RUN_US microseconds, and returns
 *   read               "PUSHED DONE" of this open file; a job counts as done after its last tracepoint
 *   close              waits until this open file's jobs are done
 *
 * The "hardware" is a timer that runs one job at a time. Every open file has an entity (a queue) of its own. The module
 * parameter schedulers=N makes N such pieces of hardware, mock0, mock1, ...; open files go to them in turn. With one,
 * the default, its name is mock.
 *
 * The MOCK_... macros come from ./build, which reads them off the kernel's headers: stable kernels take over changes
 * of this interface, so that the version alone does not tell.
 */
#include <drm/gpu_scheduler.h>
#include <linux/dma-fence.h>
#include <linux/err.h>
#include <linux/fs.h>
#include <linux/hrtimer.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/platform_device.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/wait.h>

#define MOST_SCHEDULERS 8
#define MOST_JOBS 100000
#define LONGEST_US 10000000

static unsigned int schedulers = 1;
module_param(schedulers, uint, 0444);
MODULE_PARM_DESC(schedulers, "how many schedulers (1 to 8)");

/* One scheduler and the hardware behind it. */
struct mock_hw {
	struct drm_gpu_scheduler sched;
	char name[8];
	struct hrtimer timer;
	struct dma_fence *running; /* what the hardware works on */
	u64 context;
	u64 seqno;
};

/* What the hardware signals. Freed by dma_fence's default, so base comes first. */
struct mock_fence {
	struct dma_fence base;
	spinlock_t lock;
};

struct mock_file {
	struct drm_sched_entity entity;
	struct drm_gpu_scheduler *list[1]; /* the entity keeps a pointer to it */
	struct mutex push; /* jobs enter the entity in the order of their sequence numbers */
	u64 client;
	atomic_t pushed;
	atomic_t done;
	wait_queue_head_t idle;
};

struct mock_job {
	struct drm_sched_job base;
	struct mock_file *file;
	u32 run_us;
};

static struct mock_hw hardware[MOST_SCHEDULERS];
static struct platform_device *device;
static atomic_t opened = ATOMIC_INIT(0);

static const char *mock_fence_name(struct dma_fence *fence)
{
	return "mock_gpu";
}

static const struct dma_fence_ops mock_fence_ops = {
	.get_driver_name = mock_fence_name,
	.get_timeline_name = mock_fence_name,
};

/* The hardware has finished a job: the interrupt. The next run_job may come before dma_fence_signal() has returned. */
static enum hrtimer_restart mock_interrupt(struct hrtimer *timer)
{
	struct mock_hw *hw = container_of(timer, struct mock_hw, timer);
	struct dma_fence *fence = hw->running;

	hw->running = NULL;
	dma_fence_signal(fence);
	dma_fence_put(fence);
	return HRTIMER_NORESTART;
}

static struct dma_fence *mock_run_job(struct drm_sched_job *base)
{
	struct mock_job *job = container_of(base, struct mock_job, base);
	struct mock_hw *hw = container_of(base->sched, struct mock_hw, sched);
	struct mock_fence *fence = kzalloc(sizeof(*fence), GFP_KERNEL);

	if (!fence)
		return ERR_PTR(-ENOMEM);
	WARN_ON(hw->running);
	spin_lock_init(&fence->lock);
	dma_fence_init(&fence->base, &mock_fence_ops, &fence->lock, hw->context, ++hw->seqno);
	hw->running = dma_fence_get(&fence->base); /* the interrupt's; the first one is the scheduler's */
	hrtimer_start(&hw->timer, ns_to_ktime((u64)job->run_us * NSEC_PER_USEC), HRTIMER_MODE_REL);
	return &fence->base;
}

static void mock_free_job(struct drm_sched_job *base)
{
	struct mock_job *job = container_of(base, struct mock_job, base);
	struct mock_file *file = job->file;

	drm_sched_job_cleanup(base);
	kfree(job);
	/* close() may free the file as soon as it sees the count: it takes the lock that this holds. */
	spin_lock(&file->idle.lock);
	atomic_inc(&file->done);
	wake_up_locked(&file->idle);
	spin_unlock(&file->idle.lock);
}

/* Jobs have no time limit, so this never runs. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 12, 0)
static void mock_timedout_job(struct drm_sched_job *base)
{
}
#else
static enum drm_gpu_sched_stat mock_timedout_job(struct drm_sched_job *base)
{
	return DRM_GPU_SCHED_STAT_ENODEV;
}
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 16, 0)
static struct dma_fence *mock_dependency(struct drm_sched_job *base, struct drm_sched_entity *entity)
{
	return NULL;
}
#endif

static const struct drm_sched_backend_ops mock_ops = {
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 16, 0)
	.dependency = mock_dependency,
#endif
	.run_job = mock_run_job,
	.timedout_job = mock_timedout_job,
	.free_job = mock_free_job,
};

static int mock_push(struct mock_file *file, u32 run_us)
{
	struct mock_job *job = kzalloc(sizeof(*job), GFP_KERNEL);
	int err;

	if (!job)
		return -ENOMEM;
	job->file = file;
	job->run_us = run_us;
#if defined(MOCK_CLIENT_ID)
	err = drm_sched_job_init(&job->base, &file->entity, 1, file, file->client);
#elif defined(MOCK_CREDITS)
	err = drm_sched_job_init(&job->base, &file->entity, 1, file);
#else
	err = drm_sched_job_init(&job->base, &file->entity, file);
#endif
	if (err) {
		kfree(job);
		return err;
	}
	atomic_inc(&file->pushed);
#ifdef MOCK_ARM
	drm_sched_job_arm(&job->base);
	drm_sched_entity_push_job(&job->base);
#else
	drm_sched_entity_push_job(&job->base, &file->entity);
#endif
	return 0;
}

static ssize_t mock_write(struct file *filp, const char __user *from, size_t size, loff_t *at)
{
	struct mock_file *file = filp->private_data;
	char text[32] = "";
	u32 jobs, run_us;
	int err = 0;

	if (size >= sizeof(text) || copy_from_user(text, from, size))
		return -EINVAL;
	if (sscanf(text, "%u %u", &jobs, &run_us) != 2 || jobs > MOST_JOBS || run_us > LONGEST_US)
		return -EINVAL;
	mutex_lock(&file->push);
	while (jobs-- && !err)
		err = mock_push(file, run_us);
	mutex_unlock(&file->push);
	return err ? err : size;
}

/* A line at every read from the start of the file: pread(fd, ..., 0) to look again, while cat sees one line. */
static ssize_t mock_read(struct file *filp, char __user *to, size_t size, loff_t *at)
{
	struct mock_file *file = filp->private_data;
	char text[32];
	int length = scnprintf(text, sizeof(text), "%d %d\n", atomic_read(&file->pushed), atomic_read(&file->done));

	return simple_read_from_buffer(to, size, at, text, length);
}

static int mock_open(struct inode *inode, struct file *filp)
{
	struct mock_file *file = kzalloc(sizeof(*file), GFP_KERNEL);
	u32 number = atomic_inc_return(&opened);
	int err;

	if (!file)
		return -ENOMEM;
	mutex_init(&file->push);
	init_waitqueue_head(&file->idle);
	file->client = number;
	file->list[0] = &hardware[(number - 1) % schedulers].sched;
	err = drm_sched_entity_init(&file->entity, DRM_SCHED_PRIORITY_NORMAL, file->list, 1, NULL);
	if (err) {
		kfree(file);
		return err;
	}
	filp->private_data = file;
	return 0;
}

static int mock_release(struct inode *inode, struct file *filp)
{
	struct mock_file *file = filp->private_data;

	wait_event(file->idle, atomic_read(&file->done) == atomic_read(&file->pushed));
	spin_lock(&file->idle.lock); /* mock_free_job() has let go of the file */
	spin_unlock(&file->idle.lock);
	drm_sched_entity_destroy(&file->entity);
	kfree(file);
	return 0;
}

static const struct file_operations mock_fops = {
	.owner = THIS_MODULE,
	.open = mock_open,
	.release = mock_release,
	.read = mock_read,
	.write = mock_write,
	.llseek = default_llseek,
};

static struct miscdevice misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "mock_gpu",
	.fops = &mock_fops,
	.mode = 0666,
};

static int mock_hw_init(struct mock_hw *hw, unsigned int number)
{
#ifdef MOCK_INIT_ARGS
	struct drm_sched_init_args args = {
		.ops = &mock_ops,
#ifdef MOCK_CREDITS
		.num_rqs = DRM_SCHED_PRIORITY_COUNT,
#endif
		.credit_limit = 1,
		.timeout = MAX_SCHEDULE_TIMEOUT,
		.name = hw->name,
		.dev = &device->dev,
	};
#endif

	if (schedulers == 1)
		strcpy(hw->name, "mock");
	else
		snprintf(hw->name, sizeof(hw->name), "mock%u", number % 10);
	hw->context = dma_fence_context_alloc(1);
#ifdef MOCK_HRTIMER_SETUP
	hrtimer_setup(&hw->timer, mock_interrupt, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
#else
	hrtimer_init(&hw->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL);
	hw->timer.function = mock_interrupt;
#endif
#ifdef MOCK_INIT_ARGS
	return drm_sched_init(&hw->sched, &args);
#else
	return drm_sched_init(&hw->sched, &mock_ops, 1, 0, MAX_SCHEDULE_TIMEOUT, hw->name);
#endif
}

static void mock_hw_fini(unsigned int ready)
{
	while (ready--) {
		drm_sched_fini(&hardware[ready].sched);
		hrtimer_cancel(&hardware[ready].timer); /* its last interrupt has returned */
	}
}

static int __init mock_init(void)
{
	unsigned int ready;
	int err;

	if (!schedulers || schedulers > MOST_SCHEDULERS)
		return -EINVAL;
	device = platform_device_register_simple("mock_gpu", PLATFORM_DEVID_NONE, NULL, 0);
	if (IS_ERR(device))
		return PTR_ERR(device);
	for (ready = 0; ready < schedulers; ready++) {
		err = mock_hw_init(&hardware[ready], ready);
		if (err)
			goto fail;
	}
	misc.parent = &device->dev;
	err = misc_register(&misc);
	if (!err)
		return 0;
fail:
	mock_hw_fini(ready);
	platform_device_unregister(device);
	return err;
}

static void __exit mock_exit(void)
{
	misc_deregister(&misc);
	mock_hw_fini(schedulers);
	platform_device_unregister(device);
}

module_init(mock_init);
module_exit(mock_exit);
MODULE_DESCRIPTION("A GPU scheduler without a GPU, for tests of its tracepoints");
MODULE_LICENSE("GPL");
